"""Log-probabilities of given tokens, from hidden states and the LM head, without the full logits.

`logits = hidden @ W.T` is (N, V): 4,096 tokens of a 32,000-word vocabulary take 0.5 GiB in fp32, several times with
softmax and gradient. So rows are computed in chunks, and the backward pass recomputes a chunk's logits::

    forward     z = h W^T          lse = logsumexp(z)      logp = z[y] - lse
    backward    p = exp(z - lse)   dz = g (onehot(y) - p)   dh = dz W      dW = dz^T h

`token_scores` also returns statistics of the distribution over the vocabulary at each token, from the same chunk::

    lse               logsumexp(z)                                   d lse / dz = p                  z-loss
    mean_logp         mean over v of log p_v = mean(z) - lse         d mean_logp / dz = 1/V - p      label smoothing
    log_square_sum    log sum_v p_v^2 = logsumexp(2 z) - 2 lse       no gradient                     WPO

With g_lse and g_mean their incoming gradients, `dz = g (onehot(y) - p) + (g_lse - g_mean) p + g_mean / V`.

Saved for the backward pass: hidden (N, D), weight (V, D), targets (N,) and lse (N,). No buffer exceeds chunk_size x V,
except the gradient of a weight that is not frozen.

Dtypes. Products run in *the weight's* dtype: if the two differ, hidden is cast, never the weight, which is larger.
Everything else (logsumexp, gather, exp) is fp32, or float64 if the weight is float64. `dz` is multiplied by the
incoming gradient in fp32 and only then rounded to the weight's dtype: most entries of `onehot - p` are below fp16's
smallest number (6e-8), and a loss scale after the rounding could not recover them. A `dz` above 65,504 becomes inf,
which a loss scaler detects. `dW` is computed and summed over chunks in fp32. Autocast is off inside.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Formula = Callable[[Tensor, Tensor], Tensor]  # logits (C, V) and their logsumexp (C,) to (C,)
STATISTICS: Mapping[str, Formula] = MappingProxyType(
    {
        "lse": lambda logits, lse: lse,
        "mean_logp": lambda logits, lse: logits.mean(dim=1) - lse,
        "log_square_sum": lambda logits, lse: (2 * logits).logsumexp(dim=1) - 2 * lse,
    }
)
NOT_DIFFERENTIABLE = ("log_square_sum",)
CHUNK_ROWS = 1024  # rows: buffers of 125 MiB in fp32 for V = 32,000, and the products still fill a large GPU


def token_logps(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int = CHUNK_ROWS) -> Tensor:
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
    return token_scores(hidden, lm_head_weight, targets, chunk_size=chunk_size)[0]


def token_scores(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, needs: Sequence[str] = (), *, chunk_size: int = CHUNK_ROWS
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_logps`, and the statistics that `needs` names (keys of `STATISTICS`), by name.

    Arguments and errors of `token_logps`. Each statistic is (N,), in the dtype of the log-probabilities; those in
    `NOT_DIFFERENTIABLE` have no gradient. What is not named costs nothing.
    """
    _check(hidden, lm_head_weight, targets, chunk_size)
    logps, *values = _TokenScores.apply(hidden, lm_head_weight, targets, chunk_size, tuple(needs))  # type: ignore[no-untyped-call]
    return logps, dict(zip(needs, values, strict=True))


def token_logps_reference(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int = CHUNK_ROWS
) -> Tensor:
    """The same numbers in plain torch on the full (N, V) logits, with the same arguments and errors; for tests.

    `chunk_size` has no effect. Gradients are autograd's, which rounds to the weight's dtype in the same place.
    """
    return token_scores_reference(hidden, lm_head_weight, targets, chunk_size=chunk_size)[0]


def token_scores_reference(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, needs: Sequence[str] = (), *, chunk_size: int = CHUNK_ROWS
) -> tuple[Tensor, dict[str, Tensor]]:
    """The numbers of `token_scores`, likewise."""
    _check(hidden, lm_head_weight, targets, chunk_size)
    logits = _logits(hidden, lm_head_weight)  # (N, V)
    lse = logits.logsumexp(dim=1)
    statistics = {name: STATISTICS[name](logits, lse) for name in needs}
    for name in NOT_DIFFERENTIABLE:
        statistics |= {name: statistics[name].detach()} if name in statistics else {}
    return logits.gather(1, targets[:, None]).squeeze(1) - lse, statistics


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, needs: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        lse = hidden.new_empty(hidden.shape[0], dtype=_accumulation_dtype(weight))  # (N,)
        logps = torch.empty_like(lse)
        statistics = {name: torch.empty_like(lse) for name in needs}
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = _logits(hidden[rows], weight)  # (chunk, V)
            lse[rows] = logits.logsumexp(dim=1)
            # gather: logits[arange, targets] would silently read -100 from the vocabulary's end
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
            for name, values in statistics.items():
                values[rows] = STATISTICS[name](logits, lse[rows])
            del logits  # before the next chunk is allocated
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk_size, ctx.needs = chunk_size, needs
        ctx.mark_non_differentiable(*(statistics[name] for name in needs if name in NOT_DIFFERENTIABLE))
        return logps, *statistics.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        of_statistics = statistic_gradients(dict(zip(ctx.needs, grads, strict=True)), weight.shape[0]) or ()
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden.shape[0], ctx.chunk_size):
                parts = (part[rows] for part in of_statistics)
                logits = _logits(hidden[rows], weight)
                grad_logits = _grad_logits(logits, targets[rows], lse[rows], grad_logps[rows], *parts)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_logits.to(weight.dtype) @ weight).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[rows].to(weight.dtype).to(lse.dtype))
                del grad_logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def statistic_gradients(grads: Mapping[str, Tensor], vocabulary: int) -> tuple[Tensor, Tensor] | None:
    """What the statistics add to the gradient of the logits, a p + u: a = g_lse - g_mean and u = g_mean / V, (N,) each.

    None if no differentiable statistic was asked for.
    """
    lse, mean = grads.get("lse"), grads.get("mean_logp")
    if mean is None:
        return None if lse is None else (lse, torch.zeros_like(lse))
    return (-mean if lse is None else lse - mean), mean / vocabulary


def _grad_logits(logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor, *of_statistics: Tensor) -> Tensor:
    """`g (onehot(y) - p) + a p + u` of one chunk, (chunk, V) in fp32 or float64, over its logits."""
    grad = grad_logps.to(lse.dtype)  # (chunk,)
    of_p = of_statistics[0] - grad if of_statistics else -grad
    grad_logits = logits.sub_(lse[:, None]).exp_().mul_(of_p[:, None])
    if of_statistics:
        grad_logits.add_(of_statistics[1][:, None])
    return grad_logits.scatter_add_(1, targets[:, None], grad[:, None])


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
