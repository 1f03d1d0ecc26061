"""The built-in demo: a small world, a base model that knows it, and the data to fine-tune that model with."""
