"""What the head costs, and what it makes of frozen features."""
