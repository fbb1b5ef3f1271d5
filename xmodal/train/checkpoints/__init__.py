"""Checkpoints: written whole or not at all, proven, read."""
