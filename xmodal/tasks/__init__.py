"""Tasks: one file or folder each; see task.py for what a task is."""
