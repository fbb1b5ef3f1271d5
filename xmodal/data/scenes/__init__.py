"""Embedded data: scenes of shapes generated from a seed, so that everything runs offline."""
