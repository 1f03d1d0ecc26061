"""Replies from a model: the prompt goes through the same rendering function as training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from lowlevel.commands.loading import load_for_replies
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.model.attention_choice import plain_attention
from lowlevel.model.placement import Placement


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 takes the likeliest; the same seed gives the same reply."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """A generated reply; `ended` says whether it ended itself instead of being cut."""

    text: str
    num_tokens: int
    ended: bool


def stream_reply(model_dir: Path, prompt: str, system: str | None, sampling: Sampling) -> None:
    """Load DIR and print its reply to one user message as it is made."""
    model, tokenizer, placement = load_for_replies(model_dir)
    messages = [{"role": "system", "content": system}] if system is not None else []
    ids = tokenizer.encode_prompt([*messages, {"role": "user", "content": prompt}])
    streamer = TextStreamer(tokenizer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    _generate(model, tokenizer, placement, [ids], sampling, streamer)


def generate_replies(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatTokenizer,
    placement: Placement,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 16,
) -> list[Reply]:
    """Reply to prompts given as token ids, `batch_size` at a time, in the order given."""
    replies = []
    stops = stop_ids(tokenizer)
    for start in range(0, len(prompts), batch_size):
        group = prompts[start : start + batch_size]
        for row in _generate(model, tokenizer, placement, group, sampling):
            end = next((i for i, token in enumerate(row) if token in stops), None)
            kept = row[:end]
            text = str(tokenizer.tokenizer.decode(kept, skip_special_tokens=True))
            replies.append(Reply(text, len(kept), end is not None))
    return replies


def stop_ids(tokenizer: ChatTokenizer) -> list[int]:
    """Tokens that end a reply: end of sequence, and the template's end of turn."""
    return sorted({tokenizer.eos_id} | ({tokenizer.end_of_turn_id} if tokenizer.end_of_turn_id is not None else set()))


@torch.no_grad()
def _generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatTokenizer,
    placement: Placement,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    streamer: Any = None,
) -> list[list[int]]:
    """New tokens of each prompt; prompts are padded on the left, and the padding is masked by length."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    sample = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stop_ids(tokenizer),
        pad_token_id=tokenizer.pad_id,
        use_cache=True,
        **(sample if sampling.temperature > 0 else {"do_sample": False}),
    )
    torch.manual_seed(sampling.seed)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own, base.generation_config = base.generation_config, config  # its penalties would fill what is not set here
    try:
        with plain_attention(base), placement.autocast():
            output = base.generate(
                input_ids=ids.to(placement.device),
                attention_mask=mask.to(placement.device),
                generation_config=config,
                streamer=streamer,
            )
    finally:
        base.generation_config = own
    return output[:, width:].tolist()
