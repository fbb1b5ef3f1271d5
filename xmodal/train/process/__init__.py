"""Processes of a run: its holder, signals, joint decisions, the compilation cache."""
