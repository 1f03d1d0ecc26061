"""From the examples of a step to its micro-batches: which rows (order.py), in which rows of tokens (layout.py)."""
