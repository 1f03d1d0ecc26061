"""The built-in demo: a small world, a base model that knows it, and the data to fine-tune that model with."""

from pathlib import Path

DEMO_BASE = Path(__file__).parent / "base"
