"""A run from its inputs to its ending, and the folder it leaves; run.py is where it starts."""
