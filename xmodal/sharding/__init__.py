"""How arrays are laid out on a mesh of devices, and how the hosts of a run communicate."""
