"""Where arrays live on a mesh of devices."""
