"""Replies from a run, an adapter or a merged model. Prompts are rendered by the same function as training data."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import TextStreamer

from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.tokenizer import load_chat_tokenizer
from lowlevel.errors import ConfigError
from lowlevel.heartbeat import paused
from lowlevel.model.adapters import ADAPTER_CONFIG, is_reward_model, read_adapter_config
from lowlevel.model.attention_choice import MASKED
from lowlevel.model.base import load_base, resolve_name
from lowlevel.model.base_folder import CONFIG, holds_model_weights, note_of_adapter
from lowlevel.model.build import build_policy
from lowlevel.model.files import read_json_object
from lowlevel.model.placement import Placement, choose_placement
from lowlevel.model.policy import AnyModel
from lowlevel.running.reopening import Note, load_run
from lowlevel.running.run_folder import RunFolder, check_reward_run
from lowlevel.running.scoring import best_of, load_reward_run
from lowlevel.sampling import Sampler, Sampling, build_sampler
from lowlevel.sampling.completion import Ids


@dataclass(frozen=True)
class Reply:
    """A generated reply; `ended` is False if max_new_tokens cut it."""

    text: str
    num_tokens: int
    ended: bool


def question(prompt: str, system: str | None) -> list[dict[str, str]]:
    """The messages of a prompt: what the user says, after a system message if there is one."""
    said = {"system": system, "user": prompt}
    return [{"role": role, "content": text} for role, text in said.items() if text is not None]


def stream_reply(model_dir: Path, prompt: str, system: str | None, sampling: Sampling) -> None:
    """Load DIR and stream its reply to one user message to standard output, which gets nothing else."""
    sampler, tokenizer = load_for_replies(model_dir, lambda line: print(line, file=sys.stderr))
    ids = tokenizer.encode_prompt(question(prompt, system))
    streamer = TextStreamer(tokenizer.tokenizer, skip_special_tokens=True)
    with paused():  # the reply itself shows how far it is
        sampler.sample([ids], sampling, watch=lambda _, tokens: streamer.put(torch.tensor(tokens)))
    streamer.end()


def sample_best(
    model_dir: Path, prompt: str, system: str | None, sampling: Sampling, number: int, reward_dir: Path
) -> list[tuple[float, str]]:
    """Sample `number` replies to one user message; their rewards by a reward run and texts, the best first.

    Raises ConfigError for another kind of run, before a model is loaded.
    """

    def note(line: str) -> None:
        print(line, file=sys.stderr)

    check_reward_run(reward_dir)
    sampler, tokenizer = load_for_replies(model_dir, note)
    messages = question(prompt, system)
    replies = generate_replies(sampler, tokenizer, [tokenizer.encode_prompt(messages)], sampling, samples=number)
    del sampler  # the reward model needs its memory
    return best_of(load_reward_run(reward_dir, note), messages, [reply.text for reply in replies])


def generate_replies(
    sampler: Sampler, tokenizer: ChatTokenizer, prompts: Ids, sampling: Sampling, *, samples: int = 1
) -> list[Reply]:
    """`samples` replies to each prompt, given as token ids, in the given order."""
    found = [one for group in sampler.sample(prompts, sampling, samples=samples) for one in group]
    ids = [one.ids[: len(one.ids) - one.ended].tolist() for one in found]  # without the stop token
    texts = [str(tokenizer.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
    return [Reply(text, len(row), one.ended) for text, row, one in zip(texts, ids, found, strict=True)]


def load_for_replies(model_dir: Path, note: Note) -> tuple[Sampler, ChatTokenizer]:
    """A sampler of a run folder, PEFT adapter or merged model; `note` prints a line. Raises ConfigError for others."""
    model, tokenizer, placement = _load_model(model_dir, note)
    return build_sampler(model, placement, tokenizer.stop_ids, note), tokenizer


def _load_model(model_dir: Path, note: Note) -> tuple[AnyModel, ChatTokenizer, Placement]:
    if (model_dir / "config.toml").exists():
        folder = RunFolder(model_dir)
        adapter = folder.newest_adapter(note)
        if adapter and adapter != folder.adapter:
            note(f"note: {folder.words(adapter)}")
        run = load_run(model_dir, note, adapter=adapter)
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


def _load_adapter_of_run(adapter: Path, note: Note) -> tuple[AnyModel, ChatTokenizer, Placement]:
    """An adapter inside a run folder: the final one (also stacked/), a checkpoint's, or the parent without it."""
    folder = RunFolder(adapter.parent)
    run = load_run(folder.path, note, adapter=adapter if adapter.name.startswith("step-") else None)
    if adapter.name == folder.parent.name:
        run.policy.activate(parent=True, trained=False)
    return run.policy.model, run.tokenizer, run.policy.placement


def _load_adapter_alone(adapter: Path) -> tuple[AnyModel, ChatTokenizer, Placement]:
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
