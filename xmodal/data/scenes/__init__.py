"""Embedded data: scenes of shapes drawn from a seed, so that everything runs without a download."""
