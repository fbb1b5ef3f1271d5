"""Official metrics, in numpy: predictions and truths in, numbers out."""
