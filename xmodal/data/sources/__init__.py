"""Data sources: one file for each published or common format; source.py defines a source."""
