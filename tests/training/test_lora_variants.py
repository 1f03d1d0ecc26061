"""Variants of LoRA: each against PEFT, resumed bit for bit, verified, merged."""

import helpers
import pytest
import torch
from config_keys import refused
from peft.optimizers import create_loraplus_optimizer

from lowlevel.config.schema import LoraConfig, ModelConfig, TrainConfig
from lowlevel.model.adapters import build_policy
from lowlevel.model.base import load_base
from lowlevel.optim.optimizer import build_optimizer, optimizer_tensors, set_learning_rate


def made(base, **lora):
    """A fresh policy over the tiny base, with random B."""
    model = load_base(ModelConfig(name=str(base), load_in_4bit=False), helpers.CPU)
    policy = build_policy(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **lora), helpers.CPU, seed=0)
    helpers.fill_lora_b(policy)
    return policy


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_32bit"])
def test_two_learning_rates_on_the_flat_buffer_are_pefts_loraplus_optimizer(tiny_base, kind):
    config = TrainConfig(optim=kind, learning_rate=1e-3, weight_decay=0.1)
    ours, theirs = made(tiny_base, loraplus_lr_ratio=16.0), made(tiny_base)
    one = build_optimizer(ours.flat.weights, config, ours.flat.parts)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "loraplus_weight_decay": 0.1, "weight_decay": 0.1}
    other = create_loraplus_optimizer(theirs.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, **settings)
    start = ours.flat.weights.detach().clone()
    for number in range(4):
        rate = 1e-3 * (1 - number / 4)
        set_learning_rate(one, rate)
        for group, factor in zip(other.param_groups, (1, 0, 16, 16), strict=True):
            group["lr"] = rate * factor
        results = [
            helpers.step(policy, helpers.sft(packing=True), helpers.ragged_examples(), optimizer, max_grad_norm=1.0)
            for policy, optimizer in ((ours, one), (theirs, other))
        ]
        assert results[0].learning_rate == rate
    expected = torch.cat([theirs.flat.views[name].detach().flatten() for name in ours.flat.views])
    largest, mean = helpers.drifts(ours.flat.weights.detach(), expected)
    assert largest < 5e-6 and mean < 1e-6 < 1e-3 < (expected - start).abs().mean()
    kinds = [name.split(".")[-3] for name in ours.flat.views]
    assert kinds == sorted(kinds) and list(ours.flat.views) != list(theirs.flat.views)
    assert {name.split("::")[0] for name in optimizer_tensors(one)} == {"flat", "flat_B"}


def test_dora_is_refused_by_name():
    (line,) = refused({"lora": {"use_dora": True}})
    assert line.startswith("run.toml: lora.use_dora: DoRA (arXiv 2402.09353) is not supported")
