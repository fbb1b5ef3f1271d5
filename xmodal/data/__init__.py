"""Data sources, pictures and batches, in an order that is a pure function of the seed."""
