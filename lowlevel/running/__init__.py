"""A training run: inputs, resume, observation, endings, and the run folder; run.py is the entry point."""
