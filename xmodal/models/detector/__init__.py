"""Parts of object detectors."""
