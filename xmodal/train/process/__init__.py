"""Processes of a run: workdir lock, signals, joint decisions, compilation cache."""
