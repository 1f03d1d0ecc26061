"""Steps on sampled completions compiled and captured, and a run that samples and trains on a GPU."""

import sys
from pathlib import Path

import helpers
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "online"))

from rollouts_by_hand import groups_of, rollouts

import lowlevel as ll
from lowlevel.batch.layout import Shape
from lowlevel.config.online import GRPOConfig, PPOConfig, RLOOConfig
from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.execution import Eager, WithFallback
from lowlevel.methods import GRPO, PPO, RLOO
from lowlevel.model.attention_choice import Attention
from lowlevel.model.base import load_base
from lowlevel.model.build import build_policy
from lowlevel.model.placement import Placement
from lowlevel.optim.loss_scale import LossScale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")
LAYOUT = (2, 128, True, Shape(positions=64, examples=8, longest=128, capacity=256))
METHODS = {
    "dapo, kl": GRPO(GRPOConfig(beta=0.1), *LAYOUT),
    "gspo": GRPO(GRPOConfig(loss_type="grpo", importance_sampling_level="sequence"), *LAYOUT),
    "cispo": GRPO(GRPOConfig(loss_type="cispo"), *LAYOUT),
    "rloo": RLOO(RLOOConfig(), *LAYOUT),
    "ppo": PPO(PPOConfig(), *LAYOUT),
}


@pytest.mark.parametrize("name", METHODS)
def test_compiled_and_graphed_steps_equal_eager_ones(tmp_path, name):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
                                 num_attention_heads=8, num_key_value_heads=2)).save_pretrained(tmp_path)  # fmt: skip
    placement, attention = Placement(CUDA, "fp16"), Attention("lowlevel_efficient", "for a test")
    base = load_base(ModelConfig(name=str(tmp_path)), placement, attention=attention.implementation)
    lora, method = LoraConfig(r=16, lora_dropout=0.0), METHODS[name]
    policy = build_policy(base, lora, placement, seed=0, attention=attention, value_head=method.name == "ppo")
    with torch.no_grad():
        for parameter, view in policy.flat.views.items():
            if ".lora_B." in parameter:
                view.normal_(std=0.05)
    examples, found = method.credit(policy, groups_of(rollouts(prompts=6, size=4, longest=24))), []
    for mode in ("eager", "compiled", "graphed"):
        execution = Eager(policy, method) if mode == "eager" else WithFallback(policy, method, mode, pytest.fail)
        for number in range(4):
            scale = LossScale.for_precision("fp16")
            result = helpers.step(policy, method, examples, execution=execution, scale=scale, number=number)
            found.append((mode, number, result.metrics, policy.flat.grad.clone()))
    for mode, number, metrics, gradient in found[4:]:
        _, _, expected, wanted = found[number]
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=5e-3, abs=2e-3), mode
        assert metrics["ratio"] == pytest.approx(expected["ratio"], rel=1e-2), mode
        assert wanted.norm() > 0 and (gradient - wanted).norm() / wanted.norm() < 2e-2, mode


@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo", "online_dpo"])
def test_a_run_samples_and_trains_as_one_policy(tmp_path, method):
    run = getattr(ll, method)(
        "demo", output_dir=str(tmp_path / "run"), reward="rollouts_by_hand:evens",
        num_generations=4, max_completion_length=24, max_length=128, max_steps=4, r=16, learning_rate=1e-3,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, logging_steps=1, save_steps=2,
        limit=64,
    )  # fmt: skip
    steps = [record for record in run.metrics if "loss" in record]
    assert len(steps) == 4 and all(record["grad_norm"] > 0 for record in steps)
    if method != "online_dpo":
        assert max(record["sampling/sampling_logp_difference/mean"] for record in steps) < 2e-2
        assert steps[0]["ratio"] == pytest.approx(1, abs=2e-2)
    assert run.replay(4).record["loss"] == pytest.approx(steps[-1]["loss"], rel=2e-2, abs=2e-2)
