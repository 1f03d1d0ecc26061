"""A user's own loss is verified like a built-in one, and its faults are found by the check that is about them."""

from dataclasses import replace

import helpers
import pytest
import torch
from torch.nn.functional import logsigmoid
from workspace import CHATS, PAIRS

import lowlevel.methods.dpo
import lowlevel.methods.sft
from lowlevel.errors import ConfigError
from lowlevel.losses import PairLogps, TokenLogps, loss
from lowlevel.losses.registry import OWN
from lowlevel.verification.report import run_checks


def shifted(pairs: PairLogps, *, beta: float, gamma: float = 1.0):
    """-ls(x - gamma)"""
    margins = beta * pairs.deltas
    return -logsigmoid(margins - gamma), {"shifted": (margins > gamma).float()}


def by_token(pairs: PairLogps, *, beta: float, cap: float = 4.0):
    """Log-ratios of tokens, each clipped smoothly, times a number of the row."""
    ratios = cap * torch.tanh((pairs.token_logps - pairs.ref_token_logps) / cap)
    size = 2 * len(pairs.deltas) + 1  # one more for dummy tokens
    chosen, rejected = ratios.new_zeros(size).index_add(0, pairs.sequence_ids, ratios)[:-1].chunk(2)
    return -pairs.values["weight"] * logsigmoid(beta * (chosen - rejected))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def wrong_backward(pairs: PairLogps, *, beta: float):
    return -logsigmoid(Doubled.apply(beta * pairs.deltas))


def weighted_by_itself(pairs: PairLogps, *, beta: float):
    x = beta * pairs.deltas
    return -torch.sigmoid(x).detach() * logsigmoid(x)


def steep(pairs: PairLogps, *, beta: float):
    return torch.exp(10 * beta * pairs.deltas)


def centred(pairs: PairLogps, *, beta: float):
    x = beta * pairs.deltas
    return -logsigmoid(x - x.mean())


def single(pairs: PairLogps, *, beta: float):
    return -logsigmoid(beta * pairs.deltas.float())


def only_single(pairs: PairLogps, *, beta: float):
    return -logsigmoid(beta * pairs.deltas @ torch.eye(len(pairs.deltas)))


def focal(tokens: TokenLogps, *, gamma: float = 0.5):
    """-(1 - pi)^gamma log pi, times a number of the row."""
    weights = torch.cat([tokens.values["weight"], tokens.token_logps.new_zeros(1)])[tokens.sequence_ids]
    return -weights * (1.0001 - tokens.token_logps.exp()) ** gamma * tokens.token_logps


def confident(pairs: PairLogps, *, beta: float, penalty: float = 0.01):
    """-ls(x), and a penalty on the normaliser of each token."""
    lse = pairs.completion_sums(pairs.statistics["lse"].square()).view(2, -1).sum(0)
    return -logsigmoid(beta * pairs.deltas) + penalty * lse


def entropic(tokens: TokenLogps, *, gamma: float = 0.5):
    """-log pi - gamma mean_v log p_v + gamma lse^2 / 100"""
    read = tokens.statistics
    return -tokens.token_logps - gamma * read["mean_logp"] + 0.01 * gamma * read["lse"] ** 2


def relative(tokens: TokenLogps):
    return tokens.token_logps * tokens.token_logps.mean()


@pytest.fixture(scope="session")
def own(make, space):
    """A subject with a loss of this file; its rows have a weight."""
    sources = {}
    for method, rows in (("sft", CHATS), ("dpo", PAIRS)):
        weighted = [{**row, "weight": 0.5 + i % 3} for i, row in enumerate(rows)]
        sources[method] = str(helpers.write_jsonl(space.folder / f"weighted-{method}.jsonl", weighted))

    def subject(function, method="dpo", *, kwargs=None, flags=None, **more):
        loss(function, **flags or {})
        data = {"source": sources[method], "columns": ["weight"]}
        section = {"loss_type": function.__name__, "loss_kwargs": kwargs or {}}
        made = make(method, data=data, **{method: section}, **more)
        examples = tuple(replace(x, values=(0.5 + x.row % 3,)) for x in made.examples)
        return replace(made, examples=examples)

    yield subject
    OWN.clear()


def failures(subject) -> dict[str, str]:
    return {f"{check.group}: {check.name}": check.note for check in run_checks(subject) if not check.ok}


MIXED = {"mixes_pairs": True}
HOLD = [
    (shifted, "dpo", {"gamma": 0.3}, {}),
    (by_token, "dpo", {"cap": 2}, {}),
    (single, "dpo", {}, {}),
    (weighted_by_itself, "dpo", {}, {"detaches": True}),
    (centred, "dpo", {}, MIXED),
    (focal, "sft", {"gamma": 1.5}, {}),
    (confident, "dpo", {"penalty": 0.02}, {"statistics": ("lse",)}),
    (entropic, "sft", {"gamma": 1.5}, {"statistics": ("lse", "mean_logp")}),
]


@pytest.mark.parametrize(
    ("function", "method", "kwargs", "flags"), HOLD, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_loss_without_a_fault_holds(own, function, method, kwargs, flags):
    more = {"train": {"per_device_train_batch_size": 4}} if flags == MIXED else {}
    checks = run_checks(own(function, method, kwargs=kwargs, flags=flags, **more))
    assert not [check for check in checks if not check.ok]
    names = {check.name for check in checks}
    assert {f"{name} reaches the loss" for name in kwargs} <= names
    left_out = "central differences not compared: detaches" in names
    assert left_out == (function is weighted_by_itself) and ("loss, central differences" in names) != left_out
    assert ("loss of an example alone = among others" in names) == (flags != MIXED)


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="unknown statistic 'entropy'; known: lse, mean_logp, log_square_sum"):
        loss(entropic, statistics=("entropy",))


@pytest.mark.parametrize("function", [wrong_backward, weighted_by_itself])
def test_a_gradient_that_is_not_of_the_value_is_found(own, function):
    found = failures(own(function))
    assert found.keys() == {"gradients: loss, central differences", "gradients: step, central differences"}
    assert "detaches=True" in found["gradients: loss, central differences"]


@pytest.mark.parametrize(("function", "found"), [(steep, set()), (weighted_by_itself, {"loss", "step"})])
def test_a_base_too_large_for_float64(own, function, found):
    names = {f"gradients: {what}, central differences" for what in found}
    assert failures(replace(own(function), exact_parameters=0)).keys() == names


def test_a_loss_that_mixes_pairs_without_saying_so_is_found(own):
    found = failures(own(centred))
    assert {"accounting: step loss", "loss: loss of a pair", "invariances: 4 x 1 = 1 x 4: loss"} <= found.keys()
    assert "declare mixes_pairs=True" in found["accounting: loss of an example alone = among others"]


def test_a_token_loss_that_mixes_examples_is_found(own):
    found = failures(own(relative, "sft"))
    assert {"accounting: loss of an example alone = among others", "invariances: 4 x 1 = 1 x 4: loss"} <= found.keys()


def test_hyper_parameters_that_do_not_reach_the_loss_are_found(own, monkeypatch):
    subject, plain = own(shifted, kwargs={"gamma": 0.3}), lowlevel.methods.dpo.preference_loss
    forgetful = lambda config: plain(config.model_copy(update={"loss_kwargs": {}}))  # noqa: E731
    monkeypatch.setattr(lowlevel.methods.dpo, "preference_loss", forgetful)
    subject = replace(subject, method=replace(subject.method))
    assert {"accounting: gamma reaches the loss", "loss: loss of a pair"} <= failures(subject).keys()


def test_a_token_loss_that_is_not_the_configured_one_is_found(own, monkeypatch):
    subject, plain = own(focal, "sft", kwargs={"gamma": 1.5}), lowlevel.methods.sft.sft_loss
    other = replace(plain(subject.config.sft), spec=replace(subject.method.spec, function=cross_entropy))
    monkeypatch.setattr(lowlevel.methods.sft, "sft_loss", lambda config: other)
    found = failures(replace(subject, method=replace(subject.method)))
    wrong = {"loss: summed loss of an example", "accounting: step loss", "gradients: loss in the log-probabilities"}
    assert wrong | {"accounting: gamma reaches the loss"} <= found.keys()


def cross_entropy(tokens: TokenLogps, *, gamma: float = 0.0):
    return -tokens.token_logps


def test_a_loss_that_fails_in_float64_is_one_line(own):
    with pytest.raises(ConfigError, match="loss 'only_single' fails in float64: RuntimeError.*keep the dtype"):
        run_checks(own(only_single))
