"""Saving whole or not at all, and what must be the same when a run is resumed."""
