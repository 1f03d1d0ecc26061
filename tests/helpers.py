"""A tiny Llama with random weights, ragged examples, and one optimizer step whose gradient can be looked at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.offline import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.execution import Eager, Execution
from lowlevel.kernels import token_logps
from lowlevel.loop import optimizer_step
from lowlevel.methods import Method
from lowlevel.methods.dpo import DPO
from lowlevel.methods.kto import KTO
from lowlevel.methods.reward import Reward
from lowlevel.methods.sft import SFT
from lowlevel.model.adapters import save_adapter
from lowlevel.model.attention_choice import Attention
from lowlevel.model.base import load_base
from lowlevel.model.build import build_policy
from lowlevel.model.placement import Placement
from lowlevel.model.policy import TRAINED, Policy
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.train_state import StepResult
from lowlevel.ranks import ALONE, Ranks

VOCABULARY = 320
CPU = Placement(torch.device("cpu"), "fp32")
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tokens:
    """An SFT example as the layout takes it."""

    row: int
    input_ids: np.ndarray
    labels: np.ndarray
    values: tuple[float, ...] = ()
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Pair:
    """A preference pair as the layout takes it."""

    row: int
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray


def write_tiny_base(folder: Path, **settings: object) -> None:
    """Save a 2-layer Llama (hidden 64, GQA 4/2, untied head) and a byte-level tokenizer with a Zephyr-like template.

    `settings` change the model.
    """
    torch.manual_seed(1234)
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,  # the usual 0.02 gives logits so flat that a wrong mask hardly shows
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**{**usual, **settings})).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ZEPHYR
    tokenizer.save_pretrained(folder)


def byte_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Three special tokens, all bytes, and `more` texts that are a token."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in more])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_stored_base(
    base: Path,
    folder: Path,
    kind: str = "nf4",
    double: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> Path:
    """Save a base as people publish pre-quantised ones: 4-bit linear layers, everything else in `dtype`."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        **settings,
    )
    AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantisation, device_map={"": "cpu"}
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def ragged_examples(count: int = 8, *, seed: int = 0, longest: int = 40) -> list[Tokens]:
    """SFT examples of 5 to `longest` tokens, the first 1 to 4 of them a prompt."""
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(count):
        ids = rng.integers(3, VOCABULARY, rng.integers(5, longest + 1))
        prompt = rng.integers(1, 5)
        examples.append(Tokens(10 + 7 * row, ids, np.where(np.arange(len(ids)) < prompt, -100, ids)))
    return examples


def ragged_pairs(count: int = 8, *, seed: int = 0, longest: int = 18) -> list[Pair]:
    """Preference pairs; the first one has a prompt of one token, so that nothing of it is shared."""
    rng = np.random.default_rng(seed)
    pairs = []
    for row in range(count):
        sizes = [1 if row == 0 else rng.integers(2, longest + 1), *rng.integers(1, longest + 1, 2)]
        pairs.append(Pair(3 + 5 * row, *(rng.integers(3, VOCABULARY, size) for size in sizes)))
    return pairs


def labelled_examples(count: int = 8, *, seed: int = 0, longest: int = 40) -> list[Tokens]:
    """Completions with labels for KTO; each second one has the prompt of the one before.

    The last token of each third is not scored, as the newline that some templates write behind a reply.
    """
    examples = ragged_examples(count, seed=seed, longest=longest)
    for i in range(1, count, 2):
        start, own = int((examples[i - 1].labels >= 0).argmax()), examples[i]
        reply = own.input_ids[own.labels >= 0]
        ids = np.concatenate([examples[i - 1].input_ids[:start], reply])
        examples[i] = replace(own, input_ids=ids, labels=np.where(np.arange(len(ids)) < start, -100, ids))
    for x in examples[::3]:
        x.labels[-1] = -100
    return [replace(x, values=(float(i % 4 == 0),)) for i, x in enumerate(examples)]


def make_policy(
    base: Path,
    *,
    quantised: bool = False,
    dropout: float = 0.0,
    checkpointing: bool = False,
    randomize: bool = True,
    seed: int = 0,
    placement: Placement = CPU,
    attention: str = "sdpa",
    targets: tuple[str, ...] = LoraConfig().target_modules,
    shards: Ranks | None = None,
    **options: Any,
) -> Policy:
    """A policy over the tiny base, with `options` of `build_policy`. `randomize` fills B, so that A has a gradient."""
    named = ModelConfig(name=str(base), load_in_4bit=quantised)
    model = load_base(named, placement, attention=attention, shards=shards)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    policy = build_policy(
        model,
        lora,
        placement,
        seed=seed,
        gradient_checkpointing=checkpointing,
        attention=Attention(attention, "for a test"),
        **options,
    )
    if randomize:
        fill_lora_b(policy, seed)
    return policy


def fill_lora_b(policy: Policy, seed: int = 0) -> None:
    """Random values into every B of the trained adapter."""
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, view in policy.flat.views.items():
            if ".lora_B." in name:
                view.copy_(0.1 * torch.randn(view.shape, generator=generator))


def save_random_adapter(base: Path, folder: Path, seed: int = 5) -> Path:
    """A PEFT folder with an adapter that has an effect, to stand on."""
    save_adapter(make_policy(base, seed=seed).model, TRAINED, folder, str(base))
    return folder


def sft(batch_size: int = 8, *, packing: bool = False, row_length: int = 64, **config: Any) -> SFT:
    return SFT(SFTConfig(**config), batch_size, row_length, packing)


def dpo(batch_size: int = 8, *, packing: bool = False, row_length: int = 64, **config: Any) -> DPO:
    return DPO(DPOConfig(**config), batch_size, row_length, packing)


def kto(batch_size: int = 8, *, packing: bool = False, row_length: int = 64, **config: Any) -> KTO:
    return KTO(KTOConfig(**config), batch_size, row_length, packing)


def completion_logps(policy: Policy, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """log pi(y+ | x) and log pi(y- | x), (P,) each."""
    chosen, rejected = batch.sequence_sums(policy.token_logps(batch)).chunk(2)
    return chosen, rejected


def reward(batch_size: int = 8, *, packing: bool = False, row_length: int = 64, **config: Any) -> Reward:
    return Reward(RewardConfig(**config), batch_size, row_length, packing)


def step(
    policy: Policy,
    method: Method,
    examples: Sequence[Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scale: LossScale | None = None,
    seed: int = 1,
    number: int = 0,
    max_grad_norm: float = float("inf"),
    execution: Execution | None = None,
    ranks: Ranks = ALONE,
    details: bool = False,
) -> StepResult:
    """One optimizer step; without an optimizer nothing is updated and the gradient stays in `policy.flat.grad`."""
    return optimizer_step(
        execution or Eager(policy, method),
        optimizer or torch.optim.SGD([policy.flat.weights], lr=0.0),
        method.micro_batches(examples),
        scale or LossScale.for_precision("fp32"),
        seed=seed,
        step=number,
        max_grad_norm=max_grad_norm,
        ranks=ranks,
        details=details,
    )


def loss_and_gradient(policy: Policy, method: Method, examples: Sequence[Any], **keys: Any) -> tuple[float, Tensor]:
    result = step(policy, method, examples, **keys)
    return result.metrics["loss"], policy.flat.grad.clone()


def push_mass(policy: Policy, method: Method, examples: Sequence[Any], token: int, *, steps: int = 25) -> None:
    """Train the adapter to predict `token` at every scored position: a displacement whose gainer is known."""
    optimizer = torch.optim.Adam([policy.flat.weights], lr=0.03)
    for _ in range(steps):
        policy.flat.grad.zero_()
        for batch in method.micro_batches(examples):
            policy.dropout.disable()
            hidden = policy.scored_hidden_states(batch)
            targets = torch.full_like(batch.scored_targets, token)
            (-token_logps(hidden, policy.lm_head_weight, targets).mean()).backward()
        optimizer.step()


def drifts(value: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest and mean absolute difference, each relative to the same of `expected`: a bias hides from the first."""
    difference = (value.double() - expected.double()).abs()
    scale = expected.double().abs()
    return (difference.max() / scale.max()).item(), (difference.mean() / scale.mean()).item()


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def step_result(metrics, count, *, grad_norm=1.0, rate=1e-4, examples=4, tokens=100, supervised=None, positions=128):
    """An optimizer step's result, with one micro-batch that has the given sizes."""
    batch = SimpleNamespace(
        data_rows=tuple(range(examples)),
        num_tokens=tokens,
        num_scored=count if supervised is None else supervised,
        input_ids=torch.zeros(positions),
        facts={name: metrics[name] for name in metrics if name == "reward"},
    )
    return StepResult(1, metrics, grad_norm, rate, count, (batch,), ())
