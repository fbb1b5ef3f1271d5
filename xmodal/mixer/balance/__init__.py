"""Weight of each task's loss in a step: one rule a file; see balance.py for what a rule is."""
