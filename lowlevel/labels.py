"""The label of a token that nothing is learned from. Imports no torch, so that data/ imports quickly."""

IGNORED = -100  # transformers' and torch's own; lowlevel.losses, which imports nothing else, has it as IGNORE_INDEX
