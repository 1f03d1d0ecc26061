"""Replies from a run, an adapter or a merged model. Prompts are rendered by the same function as training data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.data.rendering import ChatTokenizer, load_chat_tokenizer
from lowlevel.errors import ConfigError
from lowlevel.heartbeat import counted
from lowlevel.model.adapters import ADAPTER_CONFIG, build_policy, is_reward_model, read_adapter_config
from lowlevel.model.attention_choice import MASKED, plain_attention
from lowlevel.model.base import load_base, resolve_name
from lowlevel.model.base_folder import CONFIG, holds_model_weights, note_of_adapter
from lowlevel.model.files import read_json_object
from lowlevel.model.placement import Placement, choose_placement
from lowlevel.running.reopening import Note, load_run
from lowlevel.running.run_folder import RunFolder


@dataclass(frozen=True)
class Sampling:
    """Settings of generation; temperature 0 is greedy, and the same seed gives the same reply."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """A generated reply; `ended` is False if max_new_tokens cut it."""

    text: str
    num_tokens: int
    ended: bool


def stream_reply(model_dir: Path, prompt: str, system: str | None, sampling: Sampling) -> None:
    """Load DIR and stream its reply to one user message to standard output, which gets nothing else."""
    model, tokenizer, placement = load_for_replies(model_dir, lambda line: print(line, file=sys.stderr))
    messages = [{"role": "system", "content": system}] if system is not None else []
    ids = tokenizer.encode_prompt([*messages, {"role": "user", "content": prompt}])
    streamer = TextStreamer(tokenizer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    _generate(model, tokenizer, placement, [ids], sampling, streamer)


def sample_best(
    model_dir: Path, prompt: str, system: str | None, sampling: Sampling, number: int, reward_dir: Path
) -> list[tuple[float, str]]:
    """Sample `number` replies to one user message; their rewards by a reward run and texts, the best first.

    Raises ConfigError for another kind of run, before a model is loaded.
    """
    from lowlevel.running.scoring import best_of, check_reward_run, load_reward_run

    def note(line: str) -> None:
        print(line, file=sys.stderr)

    check_reward_run(reward_dir)
    model, tokenizer, placement = load_for_replies(model_dir, note)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    replies = generate_replies(model, tokenizer, placement, [tokenizer.encode_prompt(messages)] * number, sampling)
    del model  # the reward model needs its memory
    return best_of(load_reward_run(reward_dir, note), messages, [reply.text for reply in replies])


def generate_replies(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatTokenizer,
    placement: Placement,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 16,
) -> list[Reply]:
    """Reply to prompts given as token ids, `batch_size` at a time, in the given order."""
    replies = []
    for start in counted("generating", range(0, len(prompts), batch_size), f"batches of {batch_size} replies"):
        for row in _generate(model, tokenizer, placement, prompts[start : start + batch_size], sampling):
            end = next((i for i, token in enumerate(row) if token in tokenizer.stop_ids), None)
            text = str(tokenizer.tokenizer.decode(row[:end], skip_special_tokens=True))
            replies.append(Reply(text, len(row[:end]), end is not None))
    return replies


def load_for_replies(model_dir: Path, note: Note) -> tuple[PreTrainedModel | PeftModel, ChatTokenizer, Placement]:
    """The model of a run folder, PEFT adapter or merged model; `note` prints a line. Raises ConfigError for others."""
    if (model_dir / "config.toml").exists():
        run = load_run(model_dir, note)
        return run.policy.model, run.tokenizer, run.policy.placement
    if (model_dir / ADAPTER_CONFIG).exists() and not ((model_dir / CONFIG).exists() and holds_model_weights(model_dir)):
        of_run = (model_dir.parent / "config.toml").exists()
        return _load_adapter_of_run(model_dir, note) if of_run else _load_adapter_alone(model_dir)
    if not (model_dir / CONFIG).exists():
        files = "config.toml, adapter_config.json or config.json"
        raise ConfigError(f"{model_dir} is not a run folder, PEFT adapter or model: it has no {files}")
    placement, config = choose_placement("auto"), ModelConfig(name=str(model_dir), load_in_4bit=False)
    for line in note_of_adapter(config, str(model_dir)):
        note(f"note: {line}")
    model = load_base(config, placement)
    model.eval()
    return model, load_chat_tokenizer(str(model_dir), None, None), placement


def _load_adapter_of_run(adapter: Path, note: Note) -> tuple[PreTrainedModel | PeftModel, ChatTokenizer, Placement]:
    """An adapter inside a run folder: the final one (also stacked/), a checkpoint's, or the parent without it."""
    folder = RunFolder(adapter.parent)
    run = load_run(folder.path, note, adapter=adapter if adapter.name.startswith("step-") else None)
    if adapter.name == folder.parent.name:
        run.policy.activate(parent=True, trained=False)
    return run.policy.model, run.tokenizer, run.policy.placement


def _load_adapter_alone(adapter: Path) -> tuple[PreTrainedModel | PeftModel, ChatTokenizer, Placement]:
    """An adapter outside a run folder, on its base in 4 bits (nf4, double quantisation), as in QLoRA."""
    read_adapter_config(adapter)
    if is_reward_model(adapter):
        raise ConfigError(f"{adapter} is a reward model: it gives numbers and no text")
    name = read_json_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{adapter}/adapter_config.json lacks base_model_name_or_path")
    placement = choose_placement("auto")
    base = load_base(ModelConfig(name=name), placement)
    attention = replace(MASKED, implementation=base.config._attn_implementation)
    policy = build_policy(
        base, LoraConfig(), placement, seed=0, init_from=adapter, gradient_checkpointing=False, attention=attention
    )
    own = (adapter / "tokenizer_config.json").exists()
    return policy.model, load_chat_tokenizer(str(adapter) if own else resolve_name(name), None, None), placement


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
        eos_token_id=tokenizer.stop_ids,
        pad_token_id=tokenizer.pad_id,
        use_cache=True,
        **(sample if sampling.temperature > 0 else {"do_sample": False}),
    )
    torch.manual_seed(sampling.seed)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own, base.generation_config = base.generation_config, config  # else generate() adds the base's penalties
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
