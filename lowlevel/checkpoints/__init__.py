"""Checkpoints of a run: written atomically, with SHA-256 hashes that are verified before reading."""
