"""Faults for a training run: processes that can be killed cheaply, faults inside them, and what must be left."""
