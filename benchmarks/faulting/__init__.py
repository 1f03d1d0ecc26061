"""Faults for a training run: processes that can be killed cheaply, faults that act inside them, and what must be left."""
