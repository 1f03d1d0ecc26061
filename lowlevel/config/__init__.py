"""The configuration of a run: keys (schema.py), run files and flags (file.py), contradictions between keys."""
