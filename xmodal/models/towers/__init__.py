"""Towers: one family of encoders a file."""
