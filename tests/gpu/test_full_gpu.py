"""Full fine-tuning on a GPU in fp16: eager, compiled and captured steps, and a reference with the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from small import CUDA, MODES, ragged, small_model

from lowlevel.batch.layout import Shape
from lowlevel.config.offline import DPOConfig, SFTConfig
from lowlevel.config.schema import ModelConfig, TrainConfig
from lowlevel.execution import WithFallback
from lowlevel.loop import optimizer_step
from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.model.base import load_base
from lowlevel.model.build import build_full_policy
from lowlevel.model.placement import Placement
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = Shape(64, 4, 128, 512)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize("pairs", [False, True], ids=["sft", "dpo"])
def test_every_mode_takes_the_same_full_step(model_dir, pairs):
    placement, name = Placement(CUDA, "fp16"), NAMES["efficient"]
    method = DPO(DPOConfig(), 4, 256, True, SHAPE) if pairs else SFT(SFTConfig(), 4, 128, True, SHAPE)
    steps = {}
    for mode in MODES:
        base = load_base(ModelConfig(name=model_dir, load_in_4bit=False), placement, attention=name)
        policy = build_full_policy(base, placement, attention=Attention(name, "for a test"))
        optimizer = build_optimizer(policy.flat.weights, TrainConfig(optim="paged_adamw_8bit", learning_rate=1e-4))
        execution, scale = WithFallback(policy, method, mode, pytest.fail), LossScale.for_precision("fp16")
        batches = method.micro_batches(ragged(pairs, 40))
        results = [
            optimizer_step(execution, optimizer, batches, scale, seed=0, step=step, max_grad_norm=1.0)
            for step in range(4)
        ]
        assert policy.flat.views["model.embed_tokens.weight"].grad.any()
        steps[mode] = [(result.metrics["loss"], result.grad_norm) for result in results]
        if pairs:  # the policy starts with the reference's bits, in each mode
            assert results[0].metrics["rewards/margins"] == 0
            assert results[0].metrics["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert results[-1].metrics["loss"] < results[0].metrics["loss"]
    for mode in ("compiled", "graphed"):
        for (loss, norm), (expected, wanted) in zip(steps[mode], steps["eager"], strict=True):
            assert loss == pytest.approx(expected, rel=2e-2) and norm == pytest.approx(wanted, rel=5e-2)
