"""What a step costs: FLOPs, and what machines can do by published figures."""
