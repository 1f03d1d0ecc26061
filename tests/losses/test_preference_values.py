"""Every preference loss against numbers that were worked out elsewhere, to 1e-12 in float64.

Three sources that know nothing of the implementation: the table below (by hand in float64, and by running TRL 1.16's
`_compute_loss` where it has the loss), `tests/references/losses.json` (closed forms in Python floats, gradients too,
written by `make_losses.py`), and torchtune's published test vector.
"""

import json
import math
from pathlib import Path
from typing import Any

import make_losses
import pytest
import torch

from lowlevel.losses import LOSSES, DPOOutput, PairLogps, PreferenceLoss, dpo_loss
from lowlevel.losses.reference_free import log1mexp

REFERENCES = Path(__file__).parents[1] / "references"
DOCUMENT = json.loads((REFERENCES / "losses.json").read_text(encoding="utf-8"))
POINTS = DOCUMENT["points"]
CASES = DOCUMENT["cases"]
LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
GRADIENT_KEYS = tuple(f"grad_{key}_logps" for key in LOGPS)

LOG2 = 0.6931471805599453
# loss, parameters, values at Z, P, R (beta = 0.1). exo_pair: TRL's own value differs by 5e-8, its log(eps) being fp32.
TABLE: list[tuple[str, dict[str, float], float, float, float]] = [
    ("sigmoid", {}, LOG2, 0.6209570477895321, 0.7709570477895320),
    ("cdpo", {"label_smoothing": 0.1}, LOG2, 0.6359570477895321, 0.7559570477895320),
    ("robust", {"label_smoothing": 0.1}, LOG2, 0.6022070477895320, 0.7897070477895319),
    ("hinge", {}, 1.0, 0.85, 1.15),
    ("ipo_sum", {}, 25.0, 12.25, 42.25),
    ("ipo", {}, 25.0, 21.6225, 28.355625),
    ("exo_pair", {"label_smoothing": 1e-3}, 2.761230709097915, 2.505516555477872, 3.022554081861909),
    ("nca_pair", {}, 1.3862943611198906, 1.3508248141169994, 1.4248878020567148),
    ("bco_pair", {}, 1.3862943611198906, 1.3128563080868572, 1.4628563080868573),
    ("sppo_hard", {}, 50.0, 36.25, 66.25),
    ("aot", {}, LOG2, 0.6209570477895321, 0.7709570477895320),
    ("aot_unpaired", {}, LOG2, 0.6209570477895321, 0.7709570477895320),
    ("apo_zero", {}, 1.0, 0.9625234160368497, 1.0374765839631503),
    ("apo_down", {}, 1.0, 0.9875493421351904, 1.0249324488595393),
    ("discopop", {"discopop_tau": 0.05}, 0.8465735902799727, 0.8493375792893855, 0.7894947400647002),
    ("sigmoid_norm", {}, LOG2, 0.6758002977448283, 0.7095292059996041),
    ("rpo", {"rpo_alpha": 1.0}, 3.1931471805599454, 3.1209570477895320, 3.7709570477895320),
    ("dpop", {"dpop_lambda": 50.0}, LOG2, 0.6209570477895321, 2.7182670736825040),
    ("f_forward_kl", {}, LOG2, 0.6311543835721054, 0.7592385665249740),
    ("f_js", {}, LOG2, 0.6606521625101546, 0.7267336921763430),
    ("f_alpha", {"f_alpha": 0.5}, LOG2, 0.6276909470685579, 0.7631898984635794),
    ("simpo", {"simpo_gamma": 1.0, "beta": 2.0}, 1.4632824673380314, 1.4632824673380314, 3.0485873515737420),
    ("orpo", {"orpo_lambda": 0.1}, 2.5749368565368305, 2.5749368565368305, 3.1383095061270776),
    # cpo: -ls(0.2) + 10/4, and -ls(-0.2) + 12/4
    ("cpo", {"cpo_alpha": 1.0}, 3.0981388693815920, 3.0981388693815920, 3.7981388693815918),
    ("cpo_sum", {"cpo_alpha": 1.0}, 10.598138869381592, 10.598138869381592, 12.798138869381592),
    ("nll", {}, 2.5, 2.5, 3.0),
]
MPO = "0.8*sigmoid + 0.2*bco_pair + 1*nll"  # arXiv 2411.10442
SUMS = {name for name, spec in LOSSES.items() if not (spec.needs_tokens or spec.needs_margin or spec.statistics)}

# loss, point, parameters, dL/da = dL/dchosen_logps, dL/db
GRADIENTS: list[tuple[str, str, dict[str, float], float, float]] = [
    ("sigmoid", "Z", {}, -0.05, 0.05),
    ("sigmoid", "P", {}, -0.04625701546562505, 0.04625701546562505),
    ("sigmoid", "R", {}, -0.05374298453437496, 0.05374298453437496),
    ("robust", "Z", {"label_smoothing": 0.1}, -0.0625, 0.0625),
    ("ipo_sum", "Z", {}, -10.0, 10.0),
    ("hinge", "Z", {}, -0.1, 0.1),
    ("apo_zero", "Z", {}, -0.025, 0.025),
    ("apo_down", "Z", {}, 0.0, 0.025),
    ("sppo_hard", "Z", {}, -10.0, 10.0),
    ("discopop", "Z", {}, 0.07842640972002735, -0.07842640972002735),  # beta * 0.784: the first step lowers the margin
]


def evaluate(
    point: dict[str, list[float]], loss: str, parameters: dict[str, Any]
) -> tuple[DPOOutput, dict[str, torch.Tensor]]:
    """dpo_loss in float64 and the gradients of the sum of losses in the four log-probabilities, by their key."""
    logps = [torch.tensor(point[key], dtype=torch.float64, requires_grad=True) for key in LOGPS]
    lengths = {"chosen_lengths": torch.tensor(point["n"]), "rejected_lengths": torch.tensor(point["m"])}
    output = dpo_loss(*logps, loss_type=loss, **parameters, **lengths)
    gradients = torch.autograd.grad(output.losses.sum(), logps, allow_unused=True, materialize_grads=True)
    return output, dict(zip(GRADIENT_KEYS, gradients, strict=True))


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def case_name(case: dict[str, Any]) -> str:
    return f"{case['loss']}-{case['point']}-{list(case['parameters'].values())}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_values_and_gradients_from_the_reference_file(case: dict[str, Any]) -> None:
    output, gradients = evaluate(POINTS[case["point"]], case["loss"], case["parameters"])
    close(output.losses, case["losses"])
    for key, gradient in gradients.items():
        close(gradient, case[key])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_values_of_the_table(row: tuple[str, dict[str, float], float, float, float]) -> None:
    loss, parameters, *values = row
    for name, value in zip("ZPR", values, strict=True):
        close(evaluate(POINTS[name], loss, parameters)[0].losses, [value])


@pytest.mark.parametrize("row", GRADIENTS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_closed_form_gradients(row: tuple[str, str, dict[str, float], float, float]) -> None:
    loss, point, parameters, grad_a, grad_b = row
    _, gradients = evaluate(POINTS[point], loss, parameters)
    for key, expected in zip(GRADIENT_KEYS, (grad_a, grad_b, -grad_a, -grad_b), strict=True):
        close(gradients[key], [expected])


def test_every_loss_is_in_the_table_and_in_the_file() -> None:
    assert {row[0] for row in TABLE} == SUMS
    assert {case["loss"] for case in CASES} == SUMS
    for loss in SUMS:
        spec, cases = LOSSES[loss], [case for case in CASES if case["loss"] == loss]
        extremes = set() if loss in make_losses.WITHOUT_EXTREMES else {("E", 0.1)}
        places = {(point, 0.1) for point in ("Z", "P", "R", "B")} | {("B", 0.5)} | extremes
        if "beta" in spec.parameters:
            assert {(case["point"], case["parameters"]["beta"]) for case in cases} == places
        for name in spec.parameters:  # at two values at least, so that a constant in its place is noticed
            assert len({case["parameters"][name] for case in cases}) > 1


def test_mpo_is_the_weighted_sum_of_its_terms() -> None:
    output = evaluate(POINTS["P"], MPO, {})[0]
    close(output.losses, [3.2593368998489973])
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(
        {"loss/sigmoid": 0.6209570477895321, "loss/bco_pair": 1.3128563080868572, "loss/nll": 2.5}, abs=1e-15
    )


def test_ld_dpo_discounts_the_tail_of_the_longer_completion() -> None:
    """Tokens of the chosen completion [1], of the rejected one [2 and 3], and a dummy; alpha = 0.25, beta = 0.5."""
    tokens = torch.tensor([-1.0, -2.0, -3.0, -99.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -1.0, -98.0], dtype=torch.float64)
    one = torch.zeros(1, dtype=torch.float64)
    pairs = PairLogps(one, one, one, one, torch.tensor([1]), torch.tensor([2]), tokens, reference,
                      torch.tensor([0, 1, 1, 2]))  # fmt: skip
    x = 0.5 * ((-1 + 1.5) - ((-2 + 1) + 0.25 * (-3 + 1)))  # 1.0
    losses = PreferenceLoss.of("ld_dpo", beta=0.5, ld_alpha=0.25)(pairs).losses
    close(losses, [math.log1p(math.exp(-x))])
    slope = -0.5 / (1 + math.exp(x))
    close(torch.autograd.grad(losses.sum(), tokens)[0], [slope, -slope, -0.25 * slope, 0.0])
    sums = PairLogps(*(values.sum()[None] for part in (tokens, reference) for values in (part[:1], part[1:3])))
    plain = PreferenceLoss.of("ld_dpo", beta=0.5, ld_alpha=1.0)(pairs).losses
    close(plain.detach(), PreferenceLoss.of("sigmoid", beta=0.5)(sums).losses.tolist())


def test_wpo_weighs_a_pair_by_how_likely_the_policy_would_write_it() -> None:
    """Point P with log sum p^2 = -0.3 at each token: w+ = e^(-10/4 + .3), w- = e^(-12/5 + .3); the weight is detached.

    A dummy token does not count.
    """
    tokens = torch.tensor([-1.0, -2.0, -3.0, -4.0, *[-2.4] * 5, -50.0], dtype=torch.float64, requires_grad=True)
    chosen, rejected = tokens[:4].sum()[None], tokens[4:9].sum()[None]
    ref_chosen, ref_rejected = (torch.tensor([value], dtype=torch.float64) for value in (-11.0, -11.5))
    squares = torch.tensor([-0.1, -0.5, -0.2, -0.4, *[-0.3] * 5, 9.0], dtype=torch.float64)
    pairs = PairLogps(chosen, rejected, ref_chosen, ref_rejected, torch.tensor([4]), torch.tensor([5]), tokens, None,
                      torch.tensor([0] * 4 + [1] * 5 + [2]), statistics={"log_square_sum": squares})  # fmt: skip
    output, weight = PreferenceLoss.of("wpo")(pairs), math.exp(-2.2) * math.exp(-2.1)
    close(output.losses, [weight * 0.6209570477895321])
    assert output.losses.item() == pytest.approx(0.00842549, abs=5e-9)
    close(output.metrics["wpo_weight"], [weight])
    slope = -0.04625701546562505 * weight
    close(torch.autograd.grad(output.losses.sum(), tokens)[0], [slope] * 4 + [-slope] * 5 + [0.0])


@pytest.mark.parametrize("columns", [{"margin": 2.0}, {"chosen_score": 5.0, "rejected_score": 3.0}])
def test_odpo_subtracts_the_rated_margin(columns: dict[str, float]) -> None:
    values = {name: torch.tensor([value], dtype=torch.float64) for name, value in columns.items()}
    logps = (torch.tensor([value], dtype=torch.float64) for value in (-10.0, -12.0, -11.0, -11.5))
    loss = PreferenceLoss.of("odpo", odpo_alpha=0.5)(PairLogps(*logps, values=values)).losses
    close(loss, [math.log1p(math.exp(-(0.15 - 0.5 * 2.0)))])


def test_log1mexp_is_exact_at_both_ends() -> None:
    """Naive `log1p(-exp(x))` is -inf in fp32 at x = -1e-9, where log(1 - exp(x)) = log(1e-9) = -20.7232658."""
    x = torch.tensor([0.0, -1e-9, -1e-3, -0.6931, -0.6932, -5.0, -200.0], requires_grad=True)
    found = log1mexp(x)
    expected = [-87.33654, -20.7232658, *(math.log(-math.expm1(v)) for v in (-1e-3, -0.6931, -0.6932, -5.0)), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-12)
    slopes = torch.autograd.grad(found.sum(), x)[0]
    assert slopes.isfinite().all()
    assert slopes[5].item() == pytest.approx(-1 / math.expm1(5.0), rel=1e-6)


def test_every_case_has_its_inputs_outputs_four_gradients_and_provenance() -> None:
    for case in CASES:
        pairs = len(POINTS[case["point"]]["chosen"])
        assert set(case) == {"loss", "point", "parameters", "losses", *GRADIENT_KEYS, "how"}
        assert set(case["parameters"]) == set(LOSSES[case["loss"]].parameters)
        assert [len(case[key]) for key in ("losses", *GRADIENT_KEYS)] == [pairs] * 5
        assert case["how"].startswith("by hand in Python floats, tests/references/make_losses.py: ")
    for point in POINTS.values():
        assert set(point) == {*LOGPS, "n", "m"}
        assert len({len(column) for column in point.values()}) == 1


def test_the_file_is_what_the_generator_writes() -> None:
    fresh = json.loads(make_losses.text())
    assert fresh["points"] == POINTS
    assert fresh["format"] == DOCUMENT["format"]
    numbers = ("losses", *GRADIENT_KEYS)
    for new, stored in zip(fresh["cases"], CASES, strict=True):
        assert new.keys() == stored.keys()
        for key, value in new.items():  # approx: exp and log1p may differ in the last bit between C libraries
            assert stored[key] == (pytest.approx(value, rel=1e-14, abs=1e-15) if key in numbers else value)


def test_torchtune_vector() -> None:
    point = {
        "chosen": [-0.5, -10.0, -1.0],
        "rejected": [-0.1, -30.0, -21.0],
        "ref_chosen": [-0.5, -10.1, -0.1],
        "ref_rejected": [-0.1, -20.1, -0.1],
        "n": [1, 1, 1],
        "m": [1, 1, 1],
    }
    output, _ = evaluate(point, "sigmoid", {})
    close(output.margins, [0.0, 1.0, 2.0])
    close(output.losses, [LOG2, 0.3132616875182229, 0.1269280110429725])
    close(evaluate(point, "hinge", {})[0].losses, [1.0, 0.0, 0.0])


def test_rewards_and_margins_are_detached_and_beta_times_the_logratios() -> None:
    output, _ = evaluate(POINTS["B"], "sigmoid", {"beta": 0.2})
    close(output.chosen_rewards, [0.2, -0.1, -0.05])
    close(output.rejected_rewards, [-0.1, 0.2, -0.3])
    close(output.margins, [0.3, -0.3, 0.25])
    assert output.losses.requires_grad
    assert not any(t.requires_grad for t in (output.chosen_rewards, output.rejected_rewards, output.margins))


def test_cdpo_gradient_vanishes_at_its_optimum() -> None:
    """The slope eps - s(-x) is zero where s(x) = 1 - eps: x = log((1-eps)/eps)."""
    gap = math.log(0.9 / 0.1) / 0.1
    point = {"chosen": [gap], "rejected": [0.0], "ref_chosen": [0.0], "ref_rejected": [0.0], "n": [1], "m": [1]}
    for gradient in evaluate(point, "cdpo", {"label_smoothing": 0.1})[1].values():
        close(gradient, [0.0])
