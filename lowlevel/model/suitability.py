"""Whether a base may be trained here: what the losses, packing and shared prompts assume of it, tried on a few tokens.

Every loss takes logits to be `hidden @ lm_head.T`; packing and shared prompts take attention to be all that joins two
tokens, so that a mask or a list of keys keeps examples apart. A model that is built otherwise would train, and learn
something else: a convolution or a recurrent state (LFM2, Mamba hybrids, Qwen3-Next) runs on into the next example, an
attention of a model's own may not ask for the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lowlevel.errors import ConfigError
from lowlevel.layout import PackedBatch, build_batch, pair_segment, sft_segment
from lowlevel.model.attention import plain_attention
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIRST, SECOND = 13, 9  # tokens of the examples that are tried
PROMPT = 5


def attention_window(config: PretrainedConfig) -> int | None:
    """Tokens that a query of the base's narrowest layer sees, its own included; None where it sees all before it.

    Masks and spans have no window: up to this length of an example there is no difference.
    """
    settings = config.to_dict()
    kinds = set(settings.get("layer_types") or ())
    sliding, chunk = settings.get("sliding_window"), settings.get("attention_chunk_size")
    windows = []
    if sliding and settings.get("use_sliding_window", True) and (not kinds or "sliding_attention" in kinds):
        windows.append(int(sliding))
    if chunk and (not kinds or "chunked_attention" in kinds):
        windows.append(int(chunk))
    return min(windows, default=None)


def check_base(policy: Policy) -> None:
    """Raise ConfigError unless the base computes what every loss here assumes; see the module."""
    words = policy.lm_head_weight.shape[0]
    first, second = (np.arange(start, start + 7 * size, 7) % words for start, size in ((1, FIRST), (2, SECOND)))
    segments = [sft_segment(0, 0, first, first), sft_segment(1, 1, second, second)]
    together = build_batch([segments], pairs=False).to(policy.placement.device)
    prompt, chosen, rejected = first[:PROMPT], first[PROMPT:], second[PROMPT:]
    pair = build_batch([[pair_segment(0, 0, prompt, chosen, rejected)]], pairs=True).to(policy.placement.device)
    with policy.reference():
        hidden = policy.scored_hidden_states(together)
        if not torch.equal(hidden, policy.scored_hidden_states(together)):
            raise ConfigError(
                "model.name: two equal passes differ: the model draws random numbers (dropout of its own)"
            )
        alone = {name: _alone(policy, ids) for name, ids in (("first", first), ("second", second))}
        with_rejected = _alone(policy, np.concatenate([prompt, rejected]))
        _check_lm_head(policy, first)
        _check_apart(policy, together, [alone["first"][:-1], alone["second"][:-1]], "examples that share a row")
        completions = [alone["first"][PROMPT - 1 : -1], with_rejected[PROMPT - 1 : -1]]
        _check_apart(policy, pair, completions, "completions that share a prompt")


def _alone(policy: Policy, ids: np.ndarray) -> Tensor:
    """Final hidden states of one sequence as the model itself computes them, (L, D)."""
    base, inputs = policy.causal_lm, torch.from_numpy(ids)[None].to(policy.placement.device)
    positions = torch.arange(len(ids), device=inputs.device)[None]
    with plain_attention(base), policy.placement.autocast():
        output = base.get_decoder()(input_ids=inputs, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _check_lm_head(policy: Policy, ids: np.ndarray) -> None:
    """A model may scale, cap or shift its logits after the LM head; training would then follow another distribution."""
    base, weight = policy.causal_lm, policy.lm_head_weight
    inputs = torch.from_numpy(ids)[None].to(weight.device)
    with plain_attention(base), policy.placement.autocast():
        logits = base(input_ids=inputs, use_cache=False).logits.float()
        hidden = base.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
        expected = (hidden.to(weight.dtype) @ weight.T).float()
    error = (logits - expected).abs().max().item()
    if not error <= 1e-2 * expected.abs().max().item():
        raise ConfigError(f"model.name: the model's logits are not hidden @ lm_head.T (largest difference {error:.3g})")


def _check_apart(policy: Policy, batch: PackedBatch, alone: list[Tensor], what: str) -> None:
    """Raise ConfigError where a token's hidden state in the batch is not that of its sequence alone.

    Bound: 5 % of a hidden state's norm, and 32 roundings of the dtype (25 % in bf16); another example's token that is
    seen, or one of its own that is not, changes tens of per cent.
    """
    expected = torch.cat(alone).float()
    found = policy.scored_hidden_states(batch).float()
    error = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not error <= max(0.05, 32 * torch.finfo(policy.placement.dtype).eps):
        raise ConfigError(
            f"model.name: {what} are not what each is alone (a hidden state differs by {error:.0%}): this model joins "
            "tokens by more than attention with a mask, and cannot be trained here"
        )
