"""Towers: one family of encoders per file."""
