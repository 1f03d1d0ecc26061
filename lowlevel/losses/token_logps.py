"""Log-probabilities of given tokens, from hidden states and the LM head, without the full logits.

`logits = hidden @ W.T` is (N, V): 4,096 tokens of a 32,000-word vocabulary take 0.5 GiB in fp32, several times with
softmax and gradient. So rows are computed in chunks, and the backward pass recomputes a chunk's logits::

    forward     z = h W^T          lse = logsumexp(z)      logp = z[y] - lse
    backward    p = exp(z - lse)   dz = g (onehot(y) - p)   dh = dz W      dW = dz^T h

Saved for the backward pass: hidden (N, D), weight (V, D), targets (N,) and lse (N,). No buffer exceeds chunk_size x V,
except the gradient of a weight that is not frozen.

Dtypes. Products run in *the weight's* dtype: if the two differ, hidden is cast, never the weight, which is larger.
Everything else (logsumexp, gather, exp) is fp32, or float64 if the weight is float64. `dz` is multiplied by the
incoming gradient in fp32 and only then rounded to the weight's dtype: most entries of `onehot - p` are below fp16's
smallest number (6e-8), and a loss scale after the rounding could not recover them. A `dz` above 65,504 becomes inf,
which a loss scaler detects. `dW` is computed and summed over chunks in fp32. Autocast is off inside.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

DEFAULT_CHUNK_SIZE = 1024  # rows: buffers of 125 MiB in fp32 for V = 32,000, and the products still fill a large GPU


def token_logps(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int = DEFAULT_CHUNK_SIZE
) -> Tensor:
    """`log softmax(hidden @ lm_head_weight.T)[targets]` of each row, in chunks of rows.

    Args:
        hidden: (N, D), floating; N = 0 is allowed. Supervised positions only.
        lm_head_weight: (V, D), floating; its dtype is the dtype of the matrix products.
        targets: (N,) int64 in [0, V), already shifted, without an ignore index.
        chunk_size: rows per chunk; changes the result only by the rounding of the matrix products.

    Returns:
        (N,) in fp32; float64 if the weight is float64. Differentiable once, in hidden and in the weight. No host sync.

    Raises:
        ValueError: a shape or dtype does not fit, or `chunk_size < 1`.
        RuntimeError: a target is outside [0, V) (on CPU; a device assertion on GPU).
    """
    _check(hidden, lm_head_weight, targets, chunk_size)
    logps: Tensor = _TokenLogps.apply(hidden, lm_head_weight, targets, chunk_size)  # type: ignore[no-untyped-call]
    return logps


def token_logps_reference(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int = DEFAULT_CHUNK_SIZE
) -> Tensor:
    """The same numbers in plain torch on the full (N, V) logits, with the same arguments and errors; for tests.

    `chunk_size` has no effect. Gradients are autograd's, which rounds to the weight's dtype in the same place.
    """
    _check(hidden, lm_head_weight, targets, chunk_size)
    logits = _logits(hidden, lm_head_weight)  # (N, V)
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        lse = hidden.new_empty(hidden.shape[0], dtype=_accumulation_dtype(weight))  # (N,)
        logps = torch.empty_like(lse)
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = _logits(hidden[rows], weight)  # (chunk, V)
            lse[rows] = logits.logsumexp(dim=1)
            # gather: logits[arange, targets] would silently read -100 from the vocabulary's end
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
            del logits  # before the next chunk is allocated
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk_size = chunk_size
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden.shape[0], ctx.chunk_size):
                grad_logits = _grad_logits(hidden[rows], weight, targets[rows], lse[rows], grad_logps[rows])
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_logits.to(weight.dtype) @ weight).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[rows].to(weight.dtype).to(lse.dtype))
                del grad_logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _grad_logits(hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor) -> Tensor:
    """`g (onehot(y) - p)` of one chunk, (chunk, V) in fp32 or float64, in one buffer."""
    grad = grad_logps.to(lse.dtype)[:, None]  # (chunk, 1)
    grad_logits = _logits(hidden, weight).sub_(lse[:, None]).exp_().mul_(-grad)  # -g p
    return grad_logits.scatter_add_(1, targets[:, None], grad)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden @ weight.T` in the weight's dtype, then fp32 or float64; always a new buffer."""
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.to(weight.dtype), weight).to(_accumulation_dtype(weight))


def _accumulation_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _chunks(rows: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (N, D) and lm_head_weight (V, D), got {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        found = f"{tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"targets must be ({hidden.shape[0]},) int64 for hidden {tuple(hidden.shape)}, got {found}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}")
