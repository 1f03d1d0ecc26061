"""Steps on sampled completions compiled and captured, and a run that samples and trains on a GPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "online"))

from rollouts_by_hand import groups_of, rollouts
from small import fill_lora_b, small_policy, steps_in_every_mode

import lowlevel as ll
from lowlevel.batch.layout import Shape
from lowlevel.config.online import GRPOConfig, PPOConfig, RLOOConfig
from lowlevel.methods import GRPO, PPO, RLOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LAYOUT = (2, 128, True, Shape(positions=64, examples=8, longest=128, capacity=256))
METHODS = {
    "dapo, kl": GRPO(GRPOConfig(beta=0.1), *LAYOUT),
    "gspo": GRPO(GRPOConfig(loss_type="grpo", importance_sampling_level="sequence"), *LAYOUT),
    "cispo": GRPO(GRPOConfig(loss_type="cispo"), *LAYOUT),
    "rloo": RLOO(RLOOConfig(), *LAYOUT),
    "ppo": PPO(PPOConfig(), *LAYOUT),
}


@pytest.mark.parametrize("name", METHODS)
def test_compiled_and_graphed_steps_equal_eager_ones(model_dir, name):
    method = METHODS[name]
    policy = small_policy(model_dir, lora={"lora_dropout": 0.0}, value_head=method.name == "ppo")
    fill_lora_b(policy, 0.05)
    examples = method.credit(policy, groups_of(rollouts(prompts=6, size=4, longest=24)))
    for mode, metrics, expected, error in steps_in_every_mode(policy, method, examples):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=5e-3, abs=2e-3), mode
        assert metrics["ratio"] == pytest.approx(expected["ratio"], rel=1e-2), mode
        assert error < 2e-2, mode


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
