"""Cross-entropy and sequence log-probabilities on full (B, T, V) logits, the reference of the tests.

Training uses `lowlevel.kernels.token_logps`, or its twin in `lowlevel.losses`, without full logits.

Both functions shift: `logits[:, t]` is scored against `labels[:, t + 1]`. So the first token of a completion is
scored from the last prompt position, and the first token of a row is never scored.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORE_INDEX = -100


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `-log softmax(logits[:, t])[labels[:, t + 1]]` over supervised positions, and how many there are.

    Args:
        logits: (B, T, V), any floating dtype; computed in fp32, float64 stays float64.
        labels: (B, T) int64, `-100` where nothing is learned. Not yet shifted.

    Returns:
        `loss_sum`, a scalar in fp32 (float64 for float64 logits), and `count`, an int64 scalar tensor; no host sync.
        Divide the sums of a whole step, not the means of its micro-batches. With nothing supervised the sum is a
        differentiable zero with zero gradient.

    Raises:
        ValueError: a shape does not fit.
        IndexError: a label is neither -100 nor in [0, V) (on CPU; a device assertion on GPU).
    """
    token_losses = _token_losses(logits, labels)  # (B, T-1)
    return token_losses.sum(), (labels[:, 1:] != IGNORE_INDEX).sum()


def sequence_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each row's supervised token log-probabilities: `log pi(y|x)` in Rafailov et al., arXiv 2305.18290 eq 7.

    Arguments and errors of `masked_cross_entropy`.

    Returns:
        `logps` (B,) in fp32 (float64 for float64 logits) and `lengths` (B,) int64, the number of tokens in each sum.
    """
    token_losses = _token_losses(logits, labels)  # (B, T-1)
    return -token_losses.sum(dim=1), (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of each next token, (B, T-1); exactly 0 with zero gradient where the label is -100."""
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits must be (B, T, V) and labels (B, T), got {shapes}")
    scores = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (B * (T-1), V)
    targets = labels[:, 1:]  # (B, T-1)
    losses = cross_entropy(scores, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view(targets.shape)
