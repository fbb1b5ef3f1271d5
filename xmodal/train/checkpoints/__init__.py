"""Checkpoints: atomic writes, damage checks, reading."""
