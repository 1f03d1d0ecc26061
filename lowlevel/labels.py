"""The label of a token that nothing is learned of, in a file without torch: data/ is read where there is none."""

IGNORED = -100  # transformers' and torch's own; lowlevel.losses, which stands alone, has it as IGNORE_INDEX
