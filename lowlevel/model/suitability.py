"""Check on a few tokens that a base satisfies the assumptions of losses, packing and shared prompts.

Losses assume that logits are `hidden @ lm_head.T`. Packing and shared prompts assume that tokens only interact through
attention, so that a mask or a list of keys separates examples. Other models would train on wrong numbers without an
error: a convolution or a recurrent state (LFM2, Mamba hybrids, Qwen3-Next) continues into the next example, and a
model's own attention may ignore the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowlevel.batch.layout import build_batch
from lowlevel.batch.segments import prompt_segment, sft_segment
from lowlevel.errors import ConfigError, LowlevelError, one_line
from lowlevel.model.attention_choice import plain_attention
from lowlevel.model.policy import Policy
from lowlevel.model.targets import unsupported

FIRST, PROMPT, REJECTED = 13, 5, 8  # tokens of the test: an example, its prompt, the other completion


def attention_window(config: PretrainedConfig) -> int | None:
    """Tokens that a query of the base's narrowest layer sees, including its own; None: all before it.

    Masks and spans here have no window, which makes no difference for examples up to this length.
    """
    settings = config.to_dict()
    kinds = set(settings.get("layer_types") or ())
    sliding, chunk = settings.get("sliding_window"), settings.get("attention_chunk_size")
    windows = []
    if sliding and settings.get("use_sliding_window", True) and (not kinds or "sliding_attention" in kinds):
        windows.append(int(sliding))
    if "local" in (settings.get("attention_layers") or ()):  # GPT-Neo
        windows.append(int(settings["window_size"]))
    if chunk and (not kinds or "chunked_attention" in kinds):
        windows.append(int(chunk))
    return min(windows, default=None)


def short_positions(config: PretrainedConfig) -> int | None:
    """Positions up to which the base's longrope takes its short factors; None if it has no longrope.

    transformers chooses factors by a batch's largest position, so longer examples would change the losses of others.
    """
    parameters = config.to_dict().get("rope_parameters") or {}
    tables = [table for table in (parameters, *parameters.values()) if isinstance(table, dict)]  # one, or one a kind
    lengths = [table["original_max_position_embeddings"] for table in tables if table.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def check_base(policy: Policy) -> None:
    """Raise ConfigError unless the base runs and satisfies the module's assumptions."""
    device, words = policy.placement.device, policy.lm_head_weight.shape[0]
    first, rejected = (np.arange(start, start + 7 * size, 7) % words for start, size in ((1, FIRST), (2, REJECTED)))
    prompt, chosen = first[:PROMPT], first[PROMPT:]
    second = np.concatenate([prompt, rejected])
    examples = [sft_segment(i, i, ids, ids) for i, ids in enumerate((first, second))]
    row = build_batch([examples], pairs=False).to(device)
    pair = build_batch([[prompt_segment(0, 0, prompt, {1: chosen, 2: rejected})]], pairs=True).to(device)
    with policy.reference(), _architecture_errors(policy):
        packed = policy.scored_hidden_states(row)
        if not packed.isfinite().all():
            raise ConfigError(f"model.name: hidden states are not finite in {policy.placement.precision}")
        if not torch.equal(packed, policy.scored_hidden_states(row)):
            raise ConfigError("model.name: two equal passes differ: the model draws random numbers of its own")
        alone = [_alone(policy, ids) for ids in (first, second)]
        _check_lm_head(policy, first, alone[0])
        _check_apart(policy, packed, [h[:-1] for h in alone], "examples that share a row")
        completions = [h[PROMPT - 1 : -1] for h in alone]
        _check_apart(policy, policy.scored_hidden_states(pair), completions, "completions that share a prompt")


@contextmanager
def _architecture_errors(policy: Policy) -> Iterator[None]:
    """Report errors of the first forward pass as an unsupported architecture; --debug shows the original."""
    try:
        yield
    except (LowlevelError, OSError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # the architecture's own code does not accept our arguments
        why = f"its first pass ends with {type(error).__name__}: {one_line(error)}"
        raise unsupported(policy.causal_lm.config, why) from error


def _alone(policy: Policy, ids: np.ndarray) -> Tensor:
    """Final hidden states of one sequence as the model itself computes them, (L, D)."""
    base = policy.causal_lm
    with plain_attention(base), policy.placement.autocast():
        return cast(Tensor, base.get_decoder()(input_ids=_as_row(policy, ids), use_cache=False).last_hidden_state[0])


def _as_row(policy: Policy, ids: np.ndarray) -> Tensor:
    return torch.from_numpy(ids)[None].to(policy.placement.device)


def _check_lm_head(policy: Policy, ids: np.ndarray, hidden: Tensor) -> None:
    """Raise ConfigError if the model scales, caps or shifts its logits: the losses would see other probabilities."""
    base, weight = policy.causal_lm, policy.lm_head_weight
    bias = cast("nn.Linear", base.get_output_embeddings()).bias
    if bias is not None and bias.any():
        largest = f"largest value {bias.abs().max().item():.3g}"
        raise ConfigError(f"model.name: the LM head has a bias ({largest}), which no loss here adds")
    with plain_attention(base), policy.placement.autocast():
        logits = base(input_ids=_as_row(policy, ids), use_cache=False).logits[0].float()
        expected = (hidden.to(weight.dtype) @ weight.T).float()
    error = (logits - expected).abs().max().item()
    if not error <= _rounding(hidden, weight, expected):
        raise ConfigError(f"model.name: the model's logits are not hidden @ lm_head.T (largest difference {error:.3g})")


def _rounding(hidden: Tensor, weight: Tensor, logits: Tensor) -> float:
    """Bound on the difference of two sums of the same D products: hidden (L, D), weight (V, D), logits (L, V).

    2 sqrt(D) fp32 roundings of the largest sum of absolute products (4 standard deviations of a random walk in each
    sum), and 4 roundings of the largest logit in its dtype. At D = 2048 in fp32 it is about 1e-4 of a logit.
    """
    parts = (hidden.float().abs() @ weight.float().abs().T).max().item()
    of_sums = 2 * hidden.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps * parts
    of_results = 0.0 if weight.dtype == torch.float32 else min(1e-2, 4 * torch.finfo(weight.dtype).eps)
    return of_sums + of_results * logits.abs().max().item()


def _check_apart(policy: Policy, found: Tensor, alone: list[Tensor], what: str) -> None:
    """Raise ConfigError if the hidden states (N, D) of scored tokens differ from those of each sequence alone.

    Bound: 5 % of a hidden state's norm, or 32 roundings of the dtype (25 % in bf16). A wrong set of visible tokens
    changes tens of per cent.
    """
    expected = torch.cat(alone).float()
    error = ((found.float() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not error <= max(0.05, 32 * torch.finfo(policy.placement.dtype).eps):
        raise ConfigError(
            f"model.name: {what} change each other (a hidden state differs by {error:.0%} from the example alone): "
            "this model mixes tokens by more than masked attention, and cannot be trained here"
        )
