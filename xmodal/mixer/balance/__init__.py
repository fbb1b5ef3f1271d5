"""Rules for the weight of each task's loss in a step, one per file; see balance.py."""
