"""The label of tokens without a loss. A separate file, so that data/ does not import torch."""

IGNORED = -100  # as in transformers and torch; lowlevel.losses, which imports nothing else, calls it IGNORE_INDEX
