"""Whole models as folders that answer without this package: see README.md in this folder."""
