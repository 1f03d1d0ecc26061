"""TR-DPO: a reference that follows the policy, against values by hand and against plain PEFT."""

import json
import shutil

import helpers
import pytest
import torch
from workspace import make_workspace, run

from lowlevel.checkpoints.training_state import restore_state
from lowlevel.config.file import config_from_tables
from lowlevel.config.offline import DPOConfig
from lowlevel.errors import CheckpointError
from lowlevel.execution import WithFallback
from lowlevel.methods.dpo import check_loss
from lowlevel.model.adapters import adapter_parameters
from lowlevel.model.base import load_model_config
from lowlevel.model.memory import adapter_sizes, default_plan, forecast, model_shape
from lowlevel.model.moving_reference import Following
from lowlevel.model.placement import Placement
from lowlevel.model.policy import REFERENCE, TRAINED

LN2 = 0.6931471824645996  # of fp32
PAIRS = helpers.ragged_pairs()


def steps(policy, method, count=3, execution=None):
    """Steps with a large rate, the reference moved after each; their results."""
    optimizer = torch.optim.Adam([policy.flat.weights], lr=0.02)
    for number in range(count):
        result = helpers.step(policy, method, PAIRS, optimizer, number=number, execution=execution)
        yield result
        policy.move_reference(number + 1)


def weights(policy, adapter):
    return {name: p.detach().clone() for name, p in adapter_parameters(policy.model, adapter).items()}


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow), "stacked, in 4 bits"])
def test_a_copy_after_each_step_makes_each_step_start_at_ln_2(tiny_base, parent_adapter, mode):
    stacked = mode.startswith("stacked")
    policy = helpers.make_policy(
        tiny_base, randomize=False, following=Following(1, 1.0), dropout=0.2, checkpointing=True, quantised=stacked,
        parent=parent_adapter if stacked else None, attention="lowlevel_math" if mode == "compiled" else "sdpa",
    )  # fmt: skip
    method, execution = helpers.dpo(4, packing=True), None
    if mode == "compiled":
        torch._dynamo.reset()
        execution = WithFallback(policy, method, mode, pytest.fail)
    results = list(steps(policy, method, 4, execution))
    assert [result.metrics["loss"] for result in results] == [LN2] * 4
    assert all(result.metrics["rewards/margins"] == 0 for result in results)
    references = [result.metrics["logps/ref_chosen"] for result in results]
    assert len(set(references)) == 4, "the reference moved"


def test_three_soft_updates_by_hand(tiny_base):
    policy = helpers.make_policy(tiny_base, randomize=False, following=Following(2, 0.25))
    policies, found = [], []
    for result in steps(policy, helpers.dpo(8), 6):
        policies.append(weights(policy, TRAINED))  # after the update, before the move
        found.append((weights(policy, REFERENCE), result.metrics["logps/ref_chosen"]))
    expected = {name: t if "lora_A" in name else torch.zeros_like(t)
                for name, t in weights(helpers.make_policy(tiny_base, randomize=False), TRAINED).items()}  # fmt: skip
    for number, (reference, logp) in enumerate(found):
        if number in (2, 4):  # moved after steps 2 and 4
            expected = {name: 0.25 * policies[number - 1][name] + 0.75 * expected[name] for name in expected}
        assert all(torch.allclose(reference[name], expected[name], rtol=1e-6, atol=1e-8) for name in expected)
        plain = helpers.make_policy(tiny_base, randomize=False)  # the reference as the only adapter of a model
        for name, parameter in adapter_parameters(plain.model, TRAINED).items():
            parameter.data.copy_(expected[name])
        (batch,) = helpers.dpo(8).micro_batches(PAIRS)
        assert float(helpers.completion_logps(plain, batch)[0].mean()) == pytest.approx(logp, rel=1e-6)
    assert found[0][1] == found[1][1] != found[2][1] == found[3][1] != found[4][1]


def test_micro_batches_do_not_matter(tiny_base):
    runs = []
    for size in (1, 2, 8):
        policy = helpers.make_policy(tiny_base, randomize=False, following=Following(1, 0.5))
        losses = [result.metrics["loss"] for result in steps(policy, helpers.dpo(size))]
        runs.append((losses, policy.flat.grad.clone()))
    for losses, gradient in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-6)
        assert (gradient - runs[0][1]).norm() < 1e-5 * gradient.norm()


def test_without_the_keys_there_is_no_adapter_and_with_them_the_policy_starts_the_same(tiny_base):
    plain, moving = (helpers.make_policy(tiny_base, following=f) for f in (None, Following(3, 1.0)))
    assert plain.moving is None and not adapter_parameters(plain.model, REFERENCE)
    assert torch.equal(plain.flat.weights, moving.flat.weights)
    assert plain.trainable_names() == moving.trainable_names()
    results = [helpers.step(policy, helpers.dpo(4), PAIRS).metrics for policy in (plain, moving)]
    assert results[0] == results[1], "until the first move"


def test_the_forecast_counts_the_copy(tiny_base):
    tables = {"method": "dpo", "model": {"name": str(tiny_base)}, "dpo": {"ref_model_sync_steps": 8}}
    config = config_from_tables(tables, "test")
    still = config.model_copy(update={"dpo": config.dpo.model_copy(update={"ref_model_sync_steps": None})})
    shape = model_shape(load_model_config(config.model), *adapter_sizes(config, None, None))
    found, less = (forecast(shape, c, default_plan(shape, c), Placement(torch.device("cuda"), "fp16")).peak
                   for c in (config, still))  # fmt: skip
    assert found - less == 4 * shape.trained


def test_a_loss_without_a_reference_refuses_to_move_it():
    check_loss(DPOConfig(loss_type="ipo", ref_model_sync_steps=2))
    with pytest.raises(ValueError, match="'simpo' has no reference that could move: leave out ref_model_sync_steps"):
        check_loss(DPOConfig(loss_type="simpo", ref_model_sync_steps=2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    space = make_workspace(tmp_path_factory.mktemp("moving"))
    dpo = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    said = run("dpo", space.write("run", "dpo", dpo=dpo, train={"logging_steps": 1, "save_steps": 1,
                                                               "save_total_limit": 9}))  # fmt: skip
    assert said.code == 0 and "moving: after every 2 steps it becomes 0.5 policy + 0.5 reference" in said.out
    return space.folder / "run"


def test_commands_use_the_reference_of_their_step(finished, tmp_path):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["reference"].startswith("moving reference, at first base; after every 2 steps")
    logged = [json.loads(line)["loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for step in (3, 6):
        said = run("inspect", finished, "--step", step)
        assert said.code == 0 and "the moving reference as it was then" in said.out, said.err
        assert f"loss {logged[step - 1]:.6f} (logged: {logged[step - 1]:.6f})" in said.out
    assert run("replay", finished, "--step", 5, "--from", 1).code == 0
    said = run("verify", finished)
    assert said.code == 0, said.out + said.err
    copy = shutil.copytree(finished, tmp_path / "copy")
    for checkpoint in copy.glob("step-*"):
        shutil.rmtree(checkpoint)
    said = run("inspect", copy, "--example", 0)
    assert said.code != 0 and "the moving reference of its step is in no checkpoint" in said.err
    assert run("generate", copy, "--prompt", "Hi", "--max-new-tokens", 2).code == 0, "needs no reference"


def test_a_resumed_run_cannot_lose_or_get_a_moving_reference(finished, tmp_path):
    for following, path in ((None, finished / "step-00000002"), (Following(2, 0.5), tmp_path)):
        policy = helpers.make_policy(finished.parent / "tiny", following=following)
        has = "no moving reference" if following else "a moving reference"
        with pytest.raises(CheckpointError, match=f"holds {has}: dpo.ref_model_sync_steps cannot be set or removed"):
            restore_state(policy, torch.optim.AdamW([policy.flat.weights]), path, {})
