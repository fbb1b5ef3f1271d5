"""Multi-task training: the tasks of each step, and the weight of each loss."""
