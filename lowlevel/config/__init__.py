"""The configuration of a run: its keys (schema.py), run files and flags (file.py), keys that exclude each other."""
