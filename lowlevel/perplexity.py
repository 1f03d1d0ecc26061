"""Held-out perplexity of supervised tokens, of all examples and by their length."""

import math
from collections.abc import Sequence

BUCKETS = {
    "1-64": (1, 64),
    "65-256": (65, 256),
    "257-1024": (257, 1024),
    "1025+": (1025, math.inf),
}  # supervised tokens
PERPLEXITIES = ("perplexity", *(f"perplexity/{name}" for name in BUCKETS))


def perplexities(logps: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """exp(-mean log-probability of a token), by the names of `PERPLEXITIES`: of all examples and by their length.

    Args:
        logps: of each example, summed over its supervised tokens.
        lengths: supervised tokens of each.

    Returns:
        No buckets if all examples are in one; a mean above 700 nats counts as 700.
    """
    parts = {name: [i for i, n in enumerate(lengths) if low <= n <= high] for name, (low, high) in BUCKETS.items()}
    filled = {f"perplexity/{name}": part for name, part in parts.items() if part}
    chosen = {"perplexity": list(range(len(lengths))), **(filled if len(filled) > 1 else {})}
    sums = {name: (math.fsum(logps[i] for i in part), sum(lengths[i] for i in part)) for name, part in chosen.items()}
    return {name: math.exp(min(-logp / count, 700.0)) for name, (logp, count) in sums.items()}
