"""What `dpo_loss` refuses, and that it says what to do instead. A setting that is ignored is the defect to rule out."""

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch

from lowlevel.losses import LOSSES, dpo_loss
from lowlevel.losses.dpo import PairLogps
from lowlevel.losses.dpo_table import HYPERPARAMETERS

OPTIONS = {"label_smoothing": 0.1, **{name: one.default for name, one in HYPERPARAMETERS.items()}}
LENGTHS = {"chosen_lengths": torch.tensor([4, 4]), "rejected_lengths": torch.tensor([5, 5])}


def call(**changes: Any) -> Any:
    return dpo_loss(*(torch.full((2,), value) for value in (-10.0, -12.0, -11.0, -11.5)), **changes)


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, spec in LOSSES.items() for option in OPTIONS if option not in spec.parameters],
)
def test_an_unused_parameter_is_an_error_that_names_its_users(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' does not use {option}") as caught:
        call(loss_type=name, **LENGTHS, **{option: OPTIONS[option]})
    message = str(caught.value)
    assert "\n" not in message
    for user, spec in LOSSES.items():
        if option in spec.parameters:
            assert f"'{user}'" in message


def test_the_parameters_that_each_loss_uses() -> None:
    """Written out, so that a signature which loses a parameter is noticed."""
    smoothed = dict.fromkeys(["cdpo", "robust", "exo_pair", "aot", "aot_unpaired"], ("beta", "label_smoothing"))
    own = {
        "discopop": ("beta", "discopop_tau"),
        "dpop": ("beta", "dpop_lambda"),
        "rpo": ("beta", "rpo_alpha"),
        "f_alpha": ("beta", "f_alpha"),
        "ld_dpo": ("beta", "ld_alpha"),
        "odpo": ("beta", "odpo_alpha"),
        "simpo": ("beta", "simpo_gamma"),
        "cpo": ("beta", "cpo_alpha"),
        "cpo_sum": ("beta", "cpo_alpha"),
        "orpo": ("orpo_lambda",),
        "nll": (),
    }
    assert {name: spec.parameters for name, spec in LOSSES.items()} == {
        name: (smoothed | own).get(name, ("beta",)) for name in LOSSES
    }
    averaging = {"ipo", "sigmoid_norm", "rpo", "wpo", "simpo", "orpo", "cpo", "nll"}
    assert {name for name, spec in LOSSES.items() if spec.needs_lengths} == averaging
    for name, one in HYPERPARAMETERS.items():
        for function in (spec.function for spec in LOSSES.values() if name in spec.parameters):
            assert inspect.signature(function).parameters[name].default == one.default


@pytest.mark.parametrize(("name", "beta"), [("orpo", 0.3), ("nll", 2.0)])
def test_beta_is_refused_by_a_loss_without_it(name: str, beta: float) -> None:
    with pytest.raises(ValueError, match=f"'{name}' does not use beta"):
        call(loss_type=name, beta=beta, **LENGTHS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.8*sigmoid + sigmiod", "unknown loss_type 'sigmiod'"),
        ("-1*sigmoid + nll", "'-1.sigmoid' is not"),
        ("sigmoid +", "'' is not"),
        ("x*sigmoid", "'x.sigmoid' is not"),
        ("inf*nll", "'inf.nll' is not"),
    ],
)
def test_a_sum_of_losses_that_is_not_one(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(loss_type=text, **LENGTHS)


@pytest.mark.parametrize(
    ("name", "message"),
    [("ld_dpo", "reads single tokens"), ("wpo", "reads single tokens"), ("odpo", 'data.columns = ."margin".')],
)
def test_a_loss_that_reads_more_than_sums_says_what(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(loss_type=name, **LENGTHS)


def test_label_smoothing_with_sigmoid_points_to_cdpo() -> None:
    with pytest.raises(ValueError, match="DPO with label smoothing is 'cdpo'"):
        call(label_smoothing=0.1)


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("sigmiod", "sigmoid"), ("IPO", "ipo"), ("apo-zero", "apo_zero"), ("exo", "exo_pair"), ("sft", "nll")],
)
def test_an_unknown_loss_names_the_nearest(typo: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown loss_type '{typo}': did you mean '{nearest}'") as caught:
        call(loss_type=typo)
    assert "`lowlevel losses` lists all" in str(caught.value)
    with pytest.raises(ValueError, match="known: ") as caught:
        call(loss_type="zzz")
    assert all(name in str(caught.value) for name in LOSSES)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "rpo"])
@pytest.mark.parametrize("missing", ["chosen_lengths", "rejected_lengths"])
def test_missing_lengths(name: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' averages over tokens: pass chosen_lengths"):
        call(loss_type=name, **{key: value for key, value in LENGTHS.items() if key != missing})


def test_missing_lengths_are_noticed_without_dpo_loss_as_well() -> None:
    pairs = PairLogps(*(torch.zeros(2) for _ in range(4)))
    with pytest.raises(ValueError, match="pass chosen_lengths"):
        LOSSES["ipo"].function(pairs, beta=0.1)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be finite and above 0"):
        call(beta=beta)


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if "label_smoothing" in spec.parameters])
@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_out_of_range(name: str, eps: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 0.5\)"):
        call(loss_type=name, label_smoothing=eps)


def test_exo_needs_label_smoothing() -> None:
    with pytest.raises(ValueError, match="'exo_pair' .* needs it above 0: try 0.001"):
        call(loss_type="exo_pair")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("discopop", "discopop_tau", value) for value in (0.0, -1.0, 1.5, math.nan, math.inf)]
    + [(name, option, value) for name, option in (("dpop", "dpop_lambda"), ("rpo", "rpo_alpha"))
       for value in (-1.0, math.nan, math.inf)],
)  # fmt: skip
def test_other_options_out_of_range(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be"):
        call(loss_type=name, **LENGTHS, **{option: value})


def test_defaults_are_the_documented_ones() -> None:
    for name, option in (("discopop", "discopop_tau"), ("dpop", "dpop_lambda"), ("rpo", "rpo_alpha")):
        explicit = call(loss_type=name, **LENGTHS, **{option: OPTIONS[option]})
        assert torch.equal(call(loss_type=name, **LENGTHS).losses, explicit.losses)


@pytest.mark.parametrize(
    ("shapes", "lengths"),
    [([(2,), (2,), (2,), (3,)], {}), ([(2, 1)] * 4, {}), ([()] * 4, {}), ([(1,), (2,), (2,), (2,)], {})]
    + [([(2,)] * 4, {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])})],
)
def test_shapes_must_agree(shapes: list[tuple[int, ...]], lengths: dict[str, torch.Tensor]) -> None:
    """Above all no broadcasting: (P,) against (1,) or (P, 1) would give numbers."""
    with pytest.raises(ValueError, match=r"must all be \(P,\), got"):
        dpo_loss(*(torch.zeros(shape) for shape in shapes), **lengths)


def test_registry_and_results_are_read_only() -> None:
    with pytest.raises(TypeError):
        LOSSES["mine"] = LOSSES["sigmoid"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        call().losses = None
