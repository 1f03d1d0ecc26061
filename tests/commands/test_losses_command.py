"""`lowlevel losses`: its numbers are those of `tests/references`, and its flags reach the loss."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from losses_table import (
    ALL_FLAGS,
    LOGPS,
    REFERENCES,
    P,
    alone_is_other,
    by_name,
    document,
    flags,
    refused,
    shown,
    table_of,
)

import lowlevel
from lowlevel.cli import join_negative_numbers
from lowlevel.losses import LOSSES, PreferenceLoss, dpo_loss
from lowlevel.losses.dpo_table import HYPERPARAMETERS

# Numbers


SUMS = [name for name, spec in LOSSES.items() if not (spec.needs_tokens or spec.needs_margin or spec.statistics)]


@pytest.mark.parametrize("name", SUMS)
def test_values_and_gradients_are_those_of_the_reference_file(cli, name):
    """One case of each loss, at its last pair: tests/losses checks every case without the command line."""
    case = next(case for case in REFERENCES["cases"] if case["loss"] == name and not alone_is_other(case))
    point, pair = REFERENCES["points"][case["point"]], len(case["losses"]) - 1
    (row,) = document(cli, "--loss", name, *flags(point, pair, case["parameters"]))["losses"]
    assert (row["name"], row["parameters"]) == (name, case["parameters"])
    assert row["loss"] == pytest.approx(case["losses"][pair], rel=1e-12, abs=1e-12)
    for key in LOGPS:
        assert row["gradients"][key] == pytest.approx(case[f"grad_{key}_logps"][pair], rel=1e-12, abs=1e-12)
    beta, free = case["parameters"].get("beta", 0.1), LOSSES[name].reference_free
    a, b = (point[key][pair] - (0 if free else point[f"ref_{key}"][pair]) for key in LOGPS[:2])
    n, m = (point[key][pair] for key in "nm") if LOSSES[name].averages else (1, 1)
    assert row["margin"] == pytest.approx(beta * (a / n - b / m), rel=1e-12, abs=1e-15)
    slope = (n * case["grad_chosen_logps"][pair] - m * case["grad_rejected_logps"][pair]) / (2 * beta)
    assert row["slope"] == pytest.approx(slope, rel=1e-12, abs=1e-12)


def test_the_table_has_every_loss_once_in_order_with_what_the_detail_has(cli):
    words = ("--chosen", -9, "--rejected", -14, "--ref-chosen", -8.5, "--ref-rejected", -12, "--beta", 0.3)
    words += ("--chosen-length", 3, "--rejected-length", 8)
    rows = document(cli, *words)["losses"]
    assert [row["name"] for row in rows] == list(LOSSES)
    for row in rows:
        assert (row["formula"], row["paper"]) == (LOSSES[row["name"]].formula, LOSSES[row["name"]].paper)
        own = words if "beta" in LOSSES[row["name"]].parameters else (*words[:8], *words[10:])
        assert by_name(cli, "--loss", row["name"], *own) == {row["name"]: row}


def test_the_example_of_the_issue(cli):
    """sigmoid at P: -log s(0.15), and -beta s(-0.15) = -0.0462570..."""
    row = by_name(cli, *P)["sigmoid"]
    assert row["loss"] == pytest.approx(0.6209570477895321, abs=1e-15)
    assert list(row["gradients"].values()) == pytest.approx(
        [0.04625701546562505 * s for s in (-1, 1, 1, -1)], abs=1e-16
    )
    cells = table_of(shown(cli, *P))["sigmoid"]
    assert cells == ["0.15", "0.620957", "-0.046257", "0.046257", "0.046257", "-0.046257"]


def test_each_of_the_four_log_probabilities_reaches_its_own_place(cli):
    """All different, so that no two can be swapped; the path says the same."""
    words = ("--chosen", -1, "--rejected", -2, "--ref-chosen", -4, "--ref-rejected", -8, "--beta", 0.5)
    found = document(cli, *words)
    assert [found["point"][key] for key in LOGPS] == [-1, -2, -4, -8]
    assert found["path"] == pytest.approx(
        {
            "chosen_logratio": 3,
            "rejected_logratio": 6,
            "chosen_reward": 1.5,
            "rejected_reward": 3,
            "margin": -1.5,
            "sigmoid_of_minus_margin": 0.8175744761936437,  # 1 / (1 + e^-1.5)
        },
        abs=1e-15,
    )


def test_numbers_come_from_the_loss_that_trains(cli, monkeypatch):
    """Another loss, other numbers: there is no second copy of a formula."""
    plain = PreferenceLoss.__call__
    before = by_name(cli)
    monkeypatch.setattr(PreferenceLoss, "__call__", lambda *words: replace(one := plain(*words), losses=one.losses * 3))
    for name, row in by_name(cli).items():
        assert row["loss"] == pytest.approx(3 * before[name]["loss"], rel=1e-14)
        assert row["gradients"]["chosen"] == pytest.approx(3 * before[name]["gradients"]["chosen"], rel=1e-14)


DOUBLED = """
def doubled(pairs, *, gamma=2.0):
    return -gamma * pairs.deltas

def by_tokens(pairs, *, gamma=2.0):
    chosen, rejected = pairs.completion_sums(pairs.token_logps - pairs.ref_token_logps).chunk(2)
    return -gamma * (chosen - rejected)
"""


@pytest.mark.parametrize("name", ["doubled_losses:doubled", "doubled_losses:by_tokens"])
def test_a_loss_of_the_users(cli, tmp_path, monkeypatch, name):
    (tmp_path / "doubled_losses.py").write_text(DOUBLED)
    monkeypatch.syspath_prepend(tmp_path)
    row = by_name(cli, "--loss", name)[name]
    assert (row["loss"], row["parameters"]) == (pytest.approx(-3), {"gamma": 2.0})
    assert row["gradients"] == pytest.approx({"chosen": -2, "rejected": 2, "ref_chosen": 2, "ref_rejected": -2})
    assert "gamma" in shown(cli, "--loss", name)


def test_a_loss_of_the_users_that_fails_is_named(cli, tmp_path, monkeypatch):
    code = "def fails(pairs, *, beta):\n    raise TypeError(f'x{beta}')\ndef needs(pairs, *, gamma):\n    return 1\n"
    (tmp_path / "failing_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name, why in (("fails", "TypeError: x0.1"), ("needs", "missing 1 required keyword-only argument: 'gamma'")):
        refused(
            cli("losses", "--loss", f"failing_losses:{name}"), f"'failing_losses:{name}' failed on a trial batch", why
        )


# Defaults and hyper-parameters


def test_without_flags_the_point_is_the_documented_one_and_marked_as_default(cli):
    defaults = [*LOGPS, "chosen_length", "rejected_length", "margin", "log_square_sum", "beta"]
    assert document(cli)["defaults"] == defaults
    assert document(cli)["losses"] == document(cli, *P[:-2], "--chosen-length", 4, "--rejected-length", 5)["losses"]
    assert shown(cli).count("(default)") == 7
    partly = shown(cli, "--chosen", -10, "--beta", 0.2)
    assert partly.count("(default)") == 5
    assert document(cli, "--chosen", -10)["defaults"] == defaults[1:]
    assert "(default)" not in shown(cli, *P, "--chosen-length", 4, "--rejected-length", 5)


def test_hyper_parameters_go_to_the_losses_that_use_them(cli):
    given = {"label_smoothing": 0.2, **{name: one.default * 0.6 for name, one in HYPERPARAMETERS.items()}}
    worse = ("--chosen", -12)  # a < 0: dpop's penalty counts
    plain = by_name(cli, *worse)
    for key, value in given.items():
        rows = by_name(cli, *worse, f"--{key.replace('_', '-')}", value)
        for name, row in rows.items():
            used = key in LOSSES[name].parameters
            assert (row["loss"] != plain[name]["loss"]) == used, (name, key)
            assert row["parameters"].get(key) == (value if used else None)


def test_beta_goes_to_every_loss_that_has_one(cli):
    plain, other = by_name(cli), by_name(cli, "--beta", 0.7)
    for name, row in other.items():
        spec, reads_beta = LOSSES[name], "beta" in LOSSES[name].parameters
        assert (row["loss"] != plain[name]["loss"]) == reads_beta
        assert row["parameters"].get("beta") == (0.7 if reads_beta else None)
        beta, difference = (0.7 if reads_beta else 0.1), (2.0 if spec.reference_free else 1.5)
        difference = -10 / 4 + 12 / 5 if spec.averages else difference
        assert row["margin"] == pytest.approx(beta * difference)


def test_lengths_go_to_the_losses_that_average(cli):
    words = {"chosen": ("--chosen-length", 40), "rejected": ("--rejected-length", 50)}
    plain = by_name(cli)
    changed = {
        key: {name for name, row in by_name(cli, *flag).items() if row["loss"] != plain[name]["loss"]}
        for key, flag in words.items()
    }
    both = {"ipo", "sigmoid_norm", "simpo", "orpo", "ld_dpo", "wpo"}
    assert changed == {"chosen": both | {"rpo", "cpo", "nll"}, "rejected": both}


def test_a_rated_margin_goes_to_odpo(cli):
    plain, other = by_name(cli), by_name(cli, "--margin", 3)
    assert [name for name in plain if plain[name]["loss"] != other[name]["loss"]] == ["odpo"]
    assert other["odpo"]["loss"] == pytest.approx(math.log1p(math.exp(3 - 0.15)))


def test_a_log_square_sum_goes_to_wpo(cli):
    plain, other = by_name(cli), by_name(cli, "--log-square-sum", -1)
    assert [name for name in plain if plain[name]["loss"] != other[name]["loss"]] == ["wpo"]
    assert plain["wpo"]["loss"] == pytest.approx(0.00842549, abs=5e-9)  # e^-2.2 e^-2.1 0.62096
    assert other["wpo"]["loss"] == pytest.approx(math.exp(-1.5 - 1.4) * 0.6209570477895321)
    refused(cli("losses", "--log-square-sum", 0.1), "--log-square-sum is the logarithm of at most 1")


def test_defaults_of_hyper_parameters_are_those_of_dpo_loss(cli):
    rows = by_name(cli)
    found = {name: {k: v for k, v in row["parameters"].items() if k != "beta"} for name, row in rows.items()}
    smoothed = dict.fromkeys(("cdpo", "robust", "aot", "aot_unpaired"), {"label_smoothing": 0.0})
    own = {"discopop": {"discopop_tau": 0.05}, "dpop": {"dpop_lambda": 50.0}, "rpo": {"rpo_alpha": 1.0}}
    own |= {"f_alpha": {"f_alpha": 0.5}, "ld_dpo": {"ld_alpha": 0.5}, "odpo": {"odpo_alpha": 1.0}}
    own |= {"simpo": {"simpo_gamma": 1.0}, "orpo": {"orpo_lambda": 0.1}}
    own |= dict.fromkeys(("cpo", "cpo_sum"), {"cpo_alpha": 1.0})
    exo = {"exo_pair": {"label_smoothing": 0.001}}
    assert {name: value for name, value in found.items() if value} == smoothed | own | exo
    logps = [torch.tensor([value], dtype=torch.float64) for value in (-10, -12, -11, -11.5)]
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])}
    for name in set(SUMS) - {"exo_pair"}:
        assert dpo_loss(*logps, loss_type=name, **lengths).losses.item() == rows[name]["loss"]


def test_no_label_smoothing_is_none_and_the_table_says_what_that_does_to_exo(cli):
    assert by_name(cli, "--label-smoothing", 0) == by_name(cli)
    assert "exo_pair needs eps > 0, here 0.001" in shown(cli, "--label-smoothing", 0)
    assert "exo_pair needs" not in shown(cli, "--label-smoothing", 0.001)
    refused(cli("losses", "--loss", "exo_pair", "--label-smoothing", 0), "'exo_pair'", "needs it above 0")


def test_the_help_states_the_defaults(cli):
    """The parser knows them as text only: numbers must come without torch."""
    said = " ".join(cli("losses", "--help").out.split("options:")[1].split())
    stated = {key: re.search(rf"{flag} NUMBER .*?\(default: (.*?)\)", said)[1] for key, flag in ALL_FLAGS.items()}
    found = document(cli)
    defaults = found["point"] | {k: v for row in found["losses"] for k, v in row["parameters"].items()}
    assert stated.pop("label_smoothing") == "0; exo_pair 0.001"
    assert stated.pop("beta") == "0.1; simpo 2"
    assert {key: float(text) for key, text in stated.items()} == {key: defaults[key] for key in stated}


# Errors


@pytest.mark.parametrize("option", ["label_smoothing", "discopop_tau", "dpop_lambda", "rpo_alpha"])
def test_an_option_that_the_named_loss_does_not_use_is_an_error(cli, option):
    for name in (name for name, spec in LOSSES.items() if option not in spec.parameters):
        said = cli("losses", "--loss", name, f"--{option.replace('_', '-')}", 0.1)
        refused(said, f"'{name}' does not use {option} (got 0.1); used by ")


@pytest.mark.parametrize("flag", ALL_FLAGS.values())
def test_what_is_not_a_finite_number_is_an_error(cli, flag):
    for text in ("nan", "inf", "-inf", "-1e999", "abc", "", "1,5", "0x10"):
        refused(cli("losses", flag, text), f"{flag} must be a finite number, got {text!r}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chosen", 0.5), "--chosen is a log-probability and cannot be above 0, got 0.5"),
        (("--ref-rejected", 1), "--ref-rejected is a log-probability"),
        (("--chosen-length", 0), "--chosen-length is a number of tokens: expected a whole number >= 1, got 0"),
        (("--rejected-length", 4.5), "--rejected-length is a number of tokens"),
        (("--rejected-length", -3), "--rejected-length is a number of tokens"),
        (("--chosen-length", "1e30"), "--chosen-length is a number of tokens"),
        (("--beta", 0), "beta must be finite and above 0, got 0.0"),
        (("--beta", -0.1), "beta must be finite and above 0, got -0.1"),
        (("--label-smoothing", 0.5), "label_smoothing is a share of flipped labels and must be in [0, 0.5), got 0.5"),
        (("--discopop-tau", 2), "discopop_tau must be in (0, 1], got 2.0"),
        (("--dpop-lambda", -1), "dpop_lambda must be finite and at least 0, got -1.0"),
        (("--rpo-alpha", -1), "rpo_alpha must be finite and at least 0, got -1.0"),
        (("--loss", "sigmiod"), "unknown loss_type 'sigmiod': did you mean 'sigmoid'?"),
        (("--loss", "", "--beta", 1), "unknown loss_type ''"),
        (("--chosen", "-1e200"), "is beyond what float64 holds"),
        (("--beta", "1e-320"), "is beyond what float64 holds"),
        (("more",), "unknown argument 'more'"),
        (("--train.seed", 1), "--train.seed"),
    ],
)
def test_what_is_out_of_range(cli, words, message):
    refused(cli("losses", *words), message)


@pytest.mark.parametrize("text", ["-1e1", "-10", "-10.", "-1E+1", "-100e-1"])
def test_a_negative_number_is_a_value_however_it_is_written(cli, text):
    base = document(cli)["losses"]
    assert document(cli, "--chosen", text)["losses"] == document(cli, f"--chosen={text}")["losses"] == base
    assert document(cli, "--chosen", text, "--rejected", "-.5e1")["point"]["rejected"] == -5


def test_only_numbers_are_joined_to_a_flag():
    words = ["losses", "-5", "--a", "-1e3", "--b=2", "-3", "--c", "-x", "--json", "--d", "4", "-inf"]
    assert join_negative_numbers(words) == [
        "losses", "-5", "--a=-1e3", "--b=2", "-3", "--c", "-x", "--json", "--d", "4", "-inf"
    ]  # fmt: skip


# A process of its own

IMPORTS = """
import sys
from lowlevel.cli import main
codes = [main(["losses", *words.split()]) for words in ("", "--loss ipo --json", "--beta x")]
heavy = {"transformers", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib"}
print("imported:", codes, sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def test_no_model_library_is_imported(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lowlevel.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert "imported: [0, 0, 2] []" in done.stderr
    assert "\x1b" not in done.stdout


def test_the_losses_of_the_other_methods_are_listed_too(cli):
    said = cli("losses")
    words = ("sft: messages", "kto: completions, label", "reward: pairs", "2402.01306", "dapo, dr_grpo")
    assert all(word in said.out for word in words)
    said = cli("losses", "--loss", "dr_grpo")
    assert said.code == 2 and "its formula: -min(r A," in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("words", [(), (*P, "--label-smoothing", 0.1), ("--rejected", -123.456)])
def test_nothing_is_cut_and_no_line_is_longer_than_the_console(cli, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "120")
    out = shown(cli, *words)
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 120
    whole(out, by_name(cli, *words))
    monkeypatch.setenv("COLUMNS", "200")
    wide = shown(cli, *words)
    assert all(spec.formula in wide and spec.paper in wide for spec in LOSSES.values())


@pytest.mark.parametrize("columns", [20, 80, 120])
def test_numbers_are_whole_even_if_they_do_not_fit(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ("--chosen", "-1.2345678e100", "--rejected", "-2.3456789e-100", "--beta", 0.123456789)
    whole(shown(cli, *words), by_name(cli, *words))


def whole(out, rows):
    """Every loss with its six numbers, to six digits."""
    cells = table_of(out)
    assert list(cells) == list(LOSSES)
    for name, row in rows.items():
        numbers = [row["margin"], row["loss"], *(row["gradients"][key] for key in LOGPS)]
        assert [float(cell) for cell in cells[name]] == pytest.approx(numbers, rel=5.1e-6)


def test_without_columns_a_pipe_gets_120(cli, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert 100 < max(len(line.rstrip()) for line in shown(cli).splitlines()) <= 120


def test_the_path_from_logps_to_the_weight_stands_above_the_table(cli):
    lines = [re.sub(r" {2,}", "|", line.strip()) for line in shown(cli, *P).splitlines()]
    path = [
        "chosen y+|rejected y-",
        "log pi, policy|-10|-12",
        "log ref, reference|-11|-11.5",
        "tokens|n+ = 4|(default)|n- = 5|(default)",
        "beta|0.1",
        "log-ratio = log pi - log ref|a = 1|b = -0.5",
        "reward = beta * log-ratio|0.1|-0.05",
        "margin = reward+ - reward-|x = 0.15",
        "sigma(-margin)|0.4625701547|weight in DPO's gradient",
    ]
    places = [lines.index(line) for line in path]
    assert places == sorted(places)
    assert places[-1] < next(i for i, line in enumerate(lines) if line.startswith("sigmoid|"))
    assert lines.count(path[-1]) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_one_loss_in_detail_has_every_digit_its_formula_and_its_paper(cli, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    out = shown(cli, "--loss", name)
    row = by_name(cli, "--loss", name)[name]
    lines = dict(re.findall(r"^ *(\S.*?) {2,}(-?[\d.e+-]+) *$", out, re.MULTILINE))
    labels = {"chosen": "dL/d chosen", "rejected": "dL/d rejected"}
    labels |= {f"ref_{key}": f"dL/d ref {key}" for key in ("chosen", "rejected")}
    expected = {"value": row["loss"], "at margin": row["margin"], "d loss / d margin (a up, b down)": row["slope"]}
    expected |= {label: row["gradients"][key] for key, label in labels.items()} | row["parameters"]
    for label, value in expected.items():
        assert float(lines[label]) == value, label
    squeezed = " ".join(out.split())
    assert LOSSES[name].formula in squeezed
    assert LOSSES[name].paper in squeezed
    assert set(table_of(out)) == set()
    assert "…" not in out


def test_zero_has_no_sign(cli):
    """At Z apo_down's two slopes cancel, and hinge is flat beyond its kink."""
    same = ("--chosen", -10, "--ref-chosen", -10, "--rejected", -12, "--ref-rejected", -12)
    assert table_of(shown(cli, *same))["apo_down"] == ["0", "1", "0", "0.025", "0", "-0.025"]
    flat = table_of(shown(cli, "--chosen", -1, "--beta", 1))["hinge"]
    assert flat[1:] == ["0"] * 5
