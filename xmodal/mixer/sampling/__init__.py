"""Rules that select the tasks and parameters of each step; see sampling.py."""
