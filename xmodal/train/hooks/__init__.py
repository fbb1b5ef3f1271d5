"""Hooks of the training loop: logging, measurements, checkpoints, evaluations, best score."""
