"""Data sources: one published or common format a file; see source.py for what a source is."""
