"""From the examples of a step to its micro-batches.

order.py        which examples a step has
segments.py     an example as positions: a prompt and its completions
packing.py      which of them share a row, and a micro-batch; replies.py: also those with one prompt in common
layout.py       the rows as tensors, `PackedBatch`; spans.py: what each position attends to
"""
