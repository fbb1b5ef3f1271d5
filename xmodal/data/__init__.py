"""Sources of examples, and the exact order in which training sees them."""
