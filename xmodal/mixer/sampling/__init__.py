"""Which tasks a step trains, and which parameters; see sampling.py."""
