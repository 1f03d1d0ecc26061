"""Measurements behind the README's numbers; run from the repository's root as `python -m benchmarks.NAME`."""
