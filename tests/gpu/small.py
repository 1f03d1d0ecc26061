"""A Llama of three layers on the GPU, policies over it, and what more than one test compares."""

from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.execution import WithFallback
from lowlevel.kernels.attention import list_keys, span_attention
from lowlevel.model.attention_choice import Attention
from lowlevel.model.base import load_base
from lowlevel.model.build import build_policy
from lowlevel.model.placement import Placement
from lowlevel.optim.loss_scale import LossScale

CUDA = torch.device("cuda")
MODES = ("eager", "compiled", "graphed")


def small_model(folder, **settings):
    """Save it; `settings` change it."""
    usual = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
             "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**usual, **settings})).save_pretrained(folder)
    return str(folder)


def small_policy(folder, precision="fp16", *, quantised=True, attention="lowlevel_efficient", lora=None, **options):
    placement, own = Placement(CUDA, precision), {"r": 16, "lora_dropout": 0.1, **(lora or {})}
    base = load_base(ModelConfig(name=folder, load_in_4bit=quantised), placement, attention=attention)
    chosen = Attention(attention, "for a test")
    return build_policy(base, LoraConfig(**own), placement, seed=0, attention=chosen, **options)


def fill_lora_b(policy, std, seed=0):
    """Random values into every B of the trained adapter."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    with torch.no_grad():
        for name, view in policy.flat.views.items():
            if ".lora_B." in name:
                view.normal_(std=std, generator=generator)


def ragged(pairs, longest=60):
    """Eight pairs whose parts have fewer than `longest` tokens, or eight texts with prompts of 5."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(3, 1000, rng.integers(low, high))

    if pairs:
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [SimpleNamespace(row=i, **{key: ids(2, longest) for key in keys}) for i in range(8)]
    texts = [ids(8, 120) for _ in range(8)]
    labels = [np.where(np.arange(len(x)) > 4, x, -100) for x in texts]
    return [SimpleNamespace(row=i, input_ids=texts[i], labels=labels[i], weights=None) for i in range(8)]


def attention_errors(batch, groups, kernel, dtype):
    """Of a kernel's output and gradients, relative to those of its twin in float64."""
    torch.manual_seed(0)
    positions, results = batch.input_ids.numel(), []
    shapes = (positions, 2 * groups, 64), (positions, 2, 64), (positions, 2, 64)
    inputs = [torch.randn(shape, device=CUDA, dtype=dtype) for shape in shapes]
    direction = torch.randn(shapes[0], device=CUDA, dtype=dtype)
    for name, kind in ((kernel, dtype), ("math", torch.float64)):
        query, key, value = (part.to(kind).requires_grad_() for part in inputs)
        listed = [list_keys(part, batch.key_index, batch.key_uses) for part in (key, value)]
        output = span_attention(query, *listed, batch.span_queries, batch.span_keys, batch.longest, 0.125, name)
        results.append([output, *torch.autograd.grad(output, (query, key, value), direction.to(kind))])
    assert all(torch.isfinite(found).all() for found in results[0])
    return [((found.double() - exact).norm() / exact.norm()).item() for found, exact in zip(*results, strict=True)]


def steps_in_every_mode(policy, method, examples):
    """For four steps compiled and captured: the mode, the metrics and the eager ones, and the gradient's error."""
    found = {}
    for mode in MODES:
        execution = WithFallback(policy, method, mode, pytest.fail)
        found[mode] = []
        for number in range(4):
            scale = LossScale.for_precision("fp16")
            result = helpers.step(policy, method, examples, execution=execution, scale=scale, number=number)
            found[mode].append((result.metrics, policy.flat.grad.clone()))
    for mode in MODES[1:]:
        for (metrics, gradient), (expected, wanted) in zip(found[mode], found["eager"], strict=True):
            assert wanted.norm() > 0
            yield mode, metrics, expected, ((gradient - wanted).norm() / wanted.norm()).item()
