"""Whether runs survive kills, signals, lost peers and bad disks: xmodal bench survival."""
