"""A loss of the user's in the methods that sample: the same bits as the built-in one, verified, and refused early."""

import helpers
import pytest
import torch
from online.rollouts_by_hand import groups_of, on_policy, rollouts
from torch.nn.functional import logsigmoid
from workspace import make_workspace, metrics, run

import lowlevel as ll
from lowlevel.config.online import GRPOConfig, PPOConfig, RLOOConfig
from lowlevel.errors import ConfigError
from lowlevel.methods import GRPO, PPO, RLOO
from lowlevel.methods.choice import check_loss

METHODS = {GRPOConfig: GRPO, RLOOConfig: RLOO, PPOConfig: PPO}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("lowlevel.losses.registry.OWN", {})
    for average in ("tokens", "sequences", "constant"):
        ll.loss(clipped, name=f"clipped_{average}", average=average)
    ll.loss(whole, average="sequences")
    ll.loss(with_kl)
    ll.loss(with_kl, name="kl_means", average="sequences")


def clipped(tokens: ll.SampledLogps, *, epsilon: float = 0.2, cliprange: float | None = None):
    r, near = (tokens.token_logps - tokens.old_logps).exp(), cliprange or epsilon
    inside = r.clamp(1 - near, 1 + near)
    losses = -torch.minimum(r * tokens.advantages, inside * tokens.advantages)
    return losses, {"moved": (inside != r).float()}


def whole(tokens: ll.SampledLogps, *, epsilon: float):
    """-min(r A, clip(r) A), r of the completion"""
    r = tokens.spread(tokens.sums(tokens.token_logps - tokens.old_logps)).exp()
    return -torch.minimum(r * tokens.advantages, r.clamp(1 - epsilon, 1 + epsilon) * tokens.advantages)


def with_kl(tokens: ll.SampledLogps, *, beta: float, scale: float = 1.0):
    d = tokens.token_logps - tokens.ref_token_logps
    return scale * clipped(tokens)[0] + beta * (torch.exp(-d) + d - 1)


PAIRS = {  # settings with the built-in loss, and what makes the user's the same
    "dapo": (GRPOConfig(epsilon=0.1), {"loss_type": "clipped_tokens"}),
    "grpo, kl": (GRPOConfig(loss_type="grpo", beta=0.3), {"loss_type": "clipped_sequences"}),
    "dr_grpo": (GRPOConfig(loss_type="dr_grpo"), {"loss_type": "clipped_constant"}),
    "own kl": (GRPOConfig(beta=0.3, kl_estimator="k3"), {"loss_type": "with_kl"}),
    "rloo": (RLOOConfig(), {"loss_type": "whole"}),
    "ppo": (PPOConfig(cliprange=0.1), {"loss_type": "clipped_tokens"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_loss_equal_to_the_built_in_one_has_its_loss_and_gradient(tiny_base, name):
    built_in, update = PAIRS[name]
    policy = helpers.make_policy(tiny_base, value_head=name == "ppo")
    found, results = on_policy(policy, rollouts(), shift=0.3), []
    for config in (built_in, built_in.model_copy(update=update)):
        method = METHODS[type(config)](config, 3, 64, packing=True)
        credited = method.credit(policy, groups_of(found))
        results.append((helpers.step(policy, method, credited), policy.flat.grad.clone()))
    (wanted, gradient), (own, other) = results
    assert own.loss == pytest.approx(wanted.loss, rel=1e-6) and own.count == wanted.count
    torch.testing.assert_close(other, gradient, rtol=0, atol=1e-7)
    if "moved" in own.metrics:
        clips = sum(value for key, value in wanted.metrics.items() if key.startswith("clip_ratio"))
        assert own.metrics["moved"] >= clips > 0  # the built-in metric counts only where the gradient is lost


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("own"))


def written(space, name, method, **own):
    own = {"reward": "rollouts_by_hand:evens", "num_generations": 2, "max_completion_length": 8, **own}
    data = {"source": str(space.sft_rows), "format": "auto"}
    return space.write(name, method, **{method: own}, data=data, train={"max_steps": 2, "logging_steps": 1})


def test_a_run_is_verified_replayed_and_inspected(space, monkeypatch):
    path = written(space, "mine", "grpo", loss_type="kl_means", loss_kwargs={"scale": 0.5}, beta=0.1, num_iterations=2)
    said = run("grpo", path)
    assert said.code == 0 and "loss kl_means" in said.out, said.err
    folder = space.folder / "mine"
    said = run("verify", folder, "--step", 2)
    assert said.code == 0 and "kl_means in float64" in said.out and "central differences" in said.out, said.out
    said = run("replay", folder, "--step", 2, "--what-if", "loss_kwargs.scale=1")
    assert said.code == 0 and "identical" in said.out.lower(), said.out + said.err
    shown = run("inspect", folder, "--step", 2)
    assert shown.code == 0 and "kl:" not in shown.out and " kl;" not in shown.out  # beta is a parameter of the loss
    monkeypatch.setattr("lowlevel.losses.registry.OWN", {})
    ll.loss(clipped, name="kl_means")
    said = run("verify", folder)
    assert said.code != 0 and "its source is not the run's" in said.err and said.err.count("\n") == 1


def favours(pairs: ll.PairLogps, *, beta: float):
    return -logsigmoid(beta * pairs.deltas)


@pytest.mark.slow
def test_online_dpo(space):
    """The same numbers as with the built-in loss, and a hash of the source."""
    ll.loss(favours)
    for name, own in (("dpo-own", {"loss_type": "favours"}), ("dpo", {})):
        said = run("online_dpo", written(space, name, "online_dpo", **own))
        assert said.code == 0, said.err
    for one, other in zip(*(metrics(space.folder / name) for name in ("dpo-own", "dpo")), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert "loss_sha256" in ll.Run(space.folder / "dpo-own").folder.read_manifest()
    assert run("verify", space.folder / "dpo-own").code == 0


def of_completions(tokens):
    return tokens.sums(tokens.token_logps)


def without_gradient(tokens):
    return tokens.old_logps * tokens.advantages


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("grpo", {"loss": of_completions}, "expected a tensor of shape (6,)"),
        ("grpo", {"loss": without_gradient}, "has no gradient"),
        ("grpo", {"loss": with_kl, "beta": 0.0}, "TypeError"),  # no reference
        ("rloo", {"loss": with_kl}, "failed on a trial batch: TypeError"),
        ("grpo", {"loss": "clipped_tokens", "delta": 2.0}, "does not use delta (got 2.0)"),
        ("ppo", {"loss": "whole", "cliprange": 0.1}, "does not use cliprange (got 0.1)"),
        ("grpo", {"loss_kwargs": {"gamma": 1.0}}, "'dapo' does not use gamma (got 1.0)"),
        ("grpo", {"loss_kwargs": {"epsilon": 0.1}}, "'dapo': epsilon is a key of its own: not in loss_kwargs"),
        ("grpo", {"loss": "dappo"}, "unknown loss_type 'dappo': did you mean 'dapo'?"),
        ("rloo", {"loss": "dapo"}, "unknown loss_type 'dapo'"),
        ("online_dpo", {"loss": "simpo"}, "unknown loss_type 'simpo'"),
        ("online_dpo", {"loss": "none:such"}, "cannot be imported"),
    ],
)
def test_refusals(method, own, message):
    config = ll.configure(method, reward="length", **own)
    with pytest.raises(ConfigError) as caught:
        check_loss(config)
    assert message in str(caught.value) and f"[{method}]" in str(caught.value) and "\n" not in str(caught.value)


def test_registering():
    with pytest.raises(ValueError, match="'dapo' is a built-in loss"):
        ll.loss(clipped, name="dapo")
    with pytest.raises(ValueError, match="unknown average 'mean'; known: tokens, sequences, constant"):
        ll.loss(clipped, average="mean")
