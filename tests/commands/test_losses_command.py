"""`lowlevel losses`: its numbers are those of `tests/references`, its flags reach the loss, its table is never cut."""

import functools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import lowlevel
from lowlevel.cli import join_negative_numbers
from lowlevel.commands.loss_curves import curve, make_figure
from lowlevel.commands.loss_points import Point, evaluate
from lowlevel.losses import LOSSES, dpo_loss

REFERENCES = json.loads((Path(__file__).parents[1] / "references" / "losses.json").read_text(encoding="utf-8"))
LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
FLAGS = {**{key: f"--{key.replace('_', '-')}" for key in LOGPS}, "n": "--chosen-length", "m": "--rejected-length"}
P = ("--chosen", -10, "--rejected", -12, "--ref-chosen", -11, "--ref-rejected", -11.5, "--beta", 0.1)
ALL_FLAGS = {
    key: f"--{key.replace('_', '-')}"
    for key in (*LOGPS, "chosen_length", "rejected_length", "beta", "label_smoothing", "discopop_tau", "dpop_lambda",
                "rpo_alpha")
}  # fmt: skip
SINGLE = [case for case in REFERENCES["cases"] if not (case["loss"].startswith("aot") and case["point"] in "BE")]


def flags(point: dict[str, list[float]], pair: int, parameters: dict[str, float]) -> list[object]:
    words = [word for key, flag in FLAGS.items() for word in (flag, point[key][pair])]
    return words + [word for key, value in parameters.items() for word in (f"--{key.replace('_', '-')}", value)]


def document(cli, *words: object) -> dict:
    said = cli("losses", "--json", *words)
    assert (said.code, said.err) == (0, "")

    def refuse(text: str):
        raise AssertionError(f"{text} is no JSON")

    return json.loads(said.out, parse_constant=refuse)


def by_name(cli, *words: object) -> dict[str, dict]:
    return {row["name"]: row for row in document(cli, *words)["losses"]}


def shown(cli, *words: object) -> str:
    said = cli("losses", *words)
    assert (said.code, said.err) == (0, "")
    return said.out


def table_of(text: str) -> dict[str, list[str]]:
    """The numbers of the first table, by loss."""
    rows = (re.match(r"^ *([a-z_]+) +(?=[-\d])([-+.\de ]+)$", line.rstrip()) for line in text.splitlines())
    return {row[1]: row[2].split() for row in rows if row and row[1] in LOSSES}


def refused(said, *texts: str) -> None:
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not re.search("Traceback|nan ", said.err)
    for text in texts:
        assert text in said.err


# Numbers


@pytest.mark.parametrize("case", SINGLE, ids=lambda c: f"{c['loss']}-{c['point']}-{list(c['parameters'].values())}")
def test_values_and_gradients_are_those_of_the_reference_file(cli, case):
    point = REFERENCES["points"][case["point"]]
    for pair in range(len(case["losses"])):
        words = flags(point, pair, case["parameters"])
        (row,) = document(cli, "--loss", case["loss"], *words)["losses"]
        assert row["name"] == case["loss"]
        assert row["parameters"] == case["parameters"]
        assert row["loss"] == pytest.approx(case["losses"][pair], rel=1e-12, abs=1e-12)
        for key in LOGPS:
            expected = case[f"grad_{key}_logps"][pair]
            assert row["gradients"][key] == pytest.approx(expected, rel=1e-12, abs=1e-12)
        beta, a, b = case["parameters"]["beta"], *(point[key][pair] - point[f"ref_{key}"][pair] for key in LOGPS[:2])
        assert row["margin"] == pytest.approx(beta * (a - b), rel=1e-12, abs=1e-15)
        slope = (case["grad_chosen_logps"][pair] - case["grad_rejected_logps"][pair]) / (2 * beta)
        assert row["slope"] == pytest.approx(slope, rel=1e-12, abs=1e-12)


def test_the_table_has_every_loss_once_in_order_with_what_the_detail_has(cli):
    words = ("--chosen", -9, "--rejected", -14, "--ref-chosen", -8.5, "--ref-rejected", -12, "--beta", 0.3)
    words += ("--chosen-length", 3, "--rejected-length", 8)
    rows = document(cli, *words)["losses"]
    assert [row["name"] for row in rows] == list(LOSSES)
    for row in rows:
        assert (row["formula"], row["paper"]) == (LOSSES[row["name"]].formula, LOSSES[row["name"]].paper)
        assert by_name(cli, "--loss", row["name"], *words) == {row["name"]: row}


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


def test_numbers_come_from_dpo_loss(cli, monkeypatch):
    """Another dpo_loss, other numbers: there is no second copy of a formula."""
    import lowlevel.commands.loss_points as command

    @functools.wraps(dpo_loss)  # the command reads defaults from the signature
    def other(*logps, **keys):
        output = dpo_loss(*logps, **keys)
        return type(output)(output.losses * 3, output.chosen_rewards, output.rejected_rewards, output.margins)

    before = by_name(cli)
    monkeypatch.setattr(command, "dpo_loss", other)
    for name, row in by_name(cli).items():
        assert row["loss"] == pytest.approx(3 * before[name]["loss"], rel=1e-14)
        assert row["gradients"]["chosen"] == pytest.approx(3 * before[name]["gradients"]["chosen"], rel=1e-14)


# Defaults and hyper-parameters


def test_without_flags_the_point_is_the_documented_one_and_marked_as_default(cli):
    assert document(cli)["defaults"] == [*LOGPS, "chosen_length", "rejected_length", "beta"]
    assert document(cli)["losses"] == document(cli, *P, "--chosen-length", 4, "--rejected-length", 5)["losses"]
    assert shown(cli).count("(default)") == 7
    partly = shown(cli, "--chosen", -10, "--beta", 0.2)
    assert partly.count("(default)") == 5
    assert document(cli, "--chosen", -10)["defaults"] == [*LOGPS[1:], "chosen_length", "rejected_length", "beta"]
    assert "(default)" not in shown(cli, *P, "--chosen-length", 4, "--rejected-length", 5)


def test_hyper_parameters_go_to_the_losses_that_use_them(cli):
    given = {"label_smoothing": 0.2, "discopop_tau": 0.3, "dpop_lambda": 7.0, "rpo_alpha": 0.6}
    worse = ("--chosen", -12)  # a < 0: dpop's penalty counts
    plain = by_name(cli, *worse)
    for key, value in given.items():
        rows = by_name(cli, *worse, f"--{key.replace('_', '-')}", value)
        for name, row in rows.items():
            used = key in LOSSES[name].parameters
            assert (row["loss"] != plain[name]["loss"]) == used, (name, key)
            assert row["parameters"].get(key) == (value if used else None)


def test_beta_goes_to_every_loss(cli):
    plain, other = by_name(cli), by_name(cli, "--beta", 0.7)
    assert all(other[name]["loss"] != plain[name]["loss"] for name in LOSSES)
    assert {row["parameters"]["beta"] for row in other.values()} == {0.7}
    assert [row["margin"] for row in other.values()] == pytest.approx([1.05] * len(LOSSES))


def test_lengths_go_to_the_losses_that_average(cli):
    words = {"chosen": ("--chosen-length", 40), "rejected": ("--rejected-length", 50)}
    plain = by_name(cli)
    changed = {
        key: {name for name, row in by_name(cli, *flag).items() if row["loss"] != plain[name]["loss"]}
        for key, flag in words.items()
    }
    assert changed == {"chosen": {"ipo", "sigmoid_norm", "rpo"}, "rejected": {"ipo", "sigmoid_norm"}}


def test_defaults_of_hyper_parameters_are_those_of_dpo_loss(cli):
    rows = by_name(cli)
    found = {name: {k: v for k, v in row["parameters"].items() if k != "beta"} for name, row in rows.items()}
    smoothed = dict.fromkeys(("cdpo", "robust", "aot", "aot_unpaired"), {"label_smoothing": 0.0})
    own = {"discopop": {"discopop_tau": 0.05}, "dpop": {"dpop_lambda": 50.0}, "rpo": {"rpo_alpha": 1.0}}
    exo = {"exo_pair": {"label_smoothing": 0.001}}
    assert {name: value for name, value in found.items() if value} == smoothed | own | exo
    logps = [torch.tensor([value], dtype=torch.float64) for value in (-10, -12, -11, -11.5)]
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])}
    for name in set(LOSSES) - {"exo_pair"}:
        assert dpo_loss(*logps, loss_type=name, **lengths).losses.item() == rows[name]["loss"]


def test_no_label_smoothing_is_none_and_the_table_says_what_that_does_to_exo(cli):
    assert by_name(cli, "--label-smoothing", 0) == by_name(cli)
    assert "exo_pair needs some: 0.001" in shown(cli, "--label-smoothing", 0)
    assert "exo_pair needs some" not in shown(cli, "--label-smoothing", 0.001)
    refused(cli("losses", "--loss", "exo_pair", "--label-smoothing", 0), "'exo_pair'", "needs it above 0")


def test_the_help_states_the_defaults(cli):
    """The parser knows them as text only: numbers must come without torch."""
    said = " ".join(cli("losses", "--help").out.split("options:")[1].split())
    stated = {key: re.search(rf"{flag} NUMBER .*?\(default: (.*?)\)", said)[1] for key, flag in ALL_FLAGS.items()}
    found = document(cli)
    defaults = found["point"] | {k: v for row in found["losses"] for k, v in row["parameters"].items()}
    assert stated.pop("label_smoothing") == "0; exo_pair 0.001"
    assert {key: float(text) for key, text in stated.items()} == {key: defaults[key] for key in stated}


# Errors


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, spec in LOSSES.items()
     for option in ("label_smoothing", "discopop_tau", "dpop_lambda", "rpo_alpha") if option not in spec.parameters],
)  # fmt: skip
def test_an_option_that_the_named_loss_does_not_use_is_an_error(cli, name, option):
    said = cli("losses", "--loss", name, f"--{option.replace('_', '-')}", 0.1)
    refused(said, f"'{name}' does not use {option} (got 0.1); used by ")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1e999", "abc", "", "1,5", "0x10"])
@pytest.mark.parametrize("flag", ALL_FLAGS.values())
def test_numbers_that_are_none(cli, flag, text):
    refused(cli("losses", flag, text), f"{flag} must be a finite number, got {text!r}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chosen", 0.5), "--chosen is a log-probability and cannot be above 0, got 0.5"),
        (("--ref-rejected", 1), "--ref-rejected is a log-probability"),
        (("--chosen-length", 0), "--chosen-length is a number of tokens, a whole number from 1 on, got 0"),
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


# What is printed


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
@pytest.mark.parametrize("words", [(), (*P, "--label-smoothing", 0.1), ("--rejected", -123.456)])
def test_nothing_is_cut_and_no_line_is_longer_than_the_console(cli, monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = shown(cli, *words)
    assert "…" not in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= columns
    cells, rows = table_of(out), by_name(cli, *words)
    assert list(cells) == list(LOSSES)
    for name, row in rows.items():
        numbers = [row["margin"], row["loss"], *(row["gradients"][key] for key in LOGPS)]
        digits = 6 if columns >= 100 else 3 if "--rejected" in words[:1] else 5  # 80 columns: fewer for 1.24e-06
        assert [float(cell) for cell in cells[name]] == pytest.approx(numbers, rel=5.1 * 10**-digits)
    squeezed = re.sub(r"\s", "", out)
    for name, spec in LOSSES.items():
        assert name in out
        if columns == 200:
            assert spec.formula in out
            assert spec.paper in out
    assert "log-ratio=logpi-logref" in squeezed


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_huge_numbers_are_whole_even_where_they_do_not_fit(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ("--chosen", "-1.2345678e100", "--rejected", "-2.3456789e-100", "--beta", 0.123456789)
    cells, rows = table_of(shown(cli, *words)), by_name(cli, *words)
    assert list(cells) == list(LOSSES)
    for name, row in rows.items():
        numbers = [row["margin"], row["loss"], *(row["gradients"][key] for key in LOGPS)]
        assert [float(cell) for cell in cells[name]] == pytest.approx(numbers, rel=6e-3)


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


def test_the_signs_are_stated_and_true(cli):
    said = " ".join(shown(cli).split())
    assert "losses are minimised, so a negative derivative raises that log-probability" in said
    assert "Margin > 0: the policy prefers y+ to y- by more than the reference does." in said
    row = by_name(cli)["sigmoid"]
    better = by_name(cli, "--chosen", -9)["sigmoid"]
    assert row["gradients"]["chosen"] < 0
    assert better["loss"] < row["loss"]
    assert better["margin"] > row["margin"] > 0


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


# The plot


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_the_plot_is_a_png_of_1200_x_600(cli, tmp_path):
    path = tmp_path / "curves.png"
    assert f"curves written to {path}" in shown(cli, "--plot", path)
    assert png_size(path) == (1200, 600)
    (row,) = document(cli, "--plot", tmp_path / "one.PNG", "--loss", "hinge")["losses"]
    assert row["name"] == "hinge"
    assert png_size(tmp_path / "one.PNG") == (1200, 600)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "one.PNG"]
    assert path.read_bytes() != (tmp_path / "one.PNG").read_bytes()


def figure_at(point: Point, **settings: float):
    rows = [
        evaluate(name, point, {k: v for k, v in settings.items() if k in LOSSES[name].parameters}) for name in LOSSES
    ]
    return rows, make_figure(rows, point)


def test_every_loss_has_its_line_its_entry_in_the_legend_and_its_own_look():
    rows, figure = figure_at(Point(), label_smoothing=0.1)
    labels = [text.get_text().replace("\n", " ").replace("\xa0", " ") for text in figure.legends[0].get_texts()]
    names = [entry.split(" ")[0] for label in labels for entry in label.split(" = ")]
    assert sorted(names) == sorted(LOSSES)
    assert "cdpo (eps 0.1) = aot (eps 0.1) = aot_unpaired (eps 0.1)" in labels
    for axis in figure.axes:
        lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
        assert len(lines) == len(labels) == len(LOSSES) - 2
        assert len({(line.get_color(), line.get_linestyle(), line._dash_pattern[1] and tuple(line._dash_pattern[1]))
                    for line in lines}) == len(lines)  # fmt: skip
    assert [axis.get_xlabel() for axis in figure.axes] == ["margin = beta (a - b)"] * 2
    assert [axis.get_ylabel().split("  ")[0] for axis in figure.axes] == ["loss", "d loss / d margin"]
    assert len({row.margin for row in rows}) == 1


def test_identical_curves_share_a_line():
    _, figure = figure_at(Point())
    labels = [text.get_text().replace("\n", " ").replace("\xa0", " ") for text in figure.legends[0].get_texts()]
    assert labels[0] == "sigmoid = cdpo (eps 0) = robust (eps 0) = aot (eps 0) = aot_unpaired (eps 0)"
    assert labels[1:3] == ["hinge", "ipo"]


@pytest.mark.parametrize("name", LOSSES)
def test_the_lines_are_the_loss_and_its_derivative(name):
    """Against -ls(x) by hand for sigmoid, and for all against the difference quotient of the loss along the path."""
    point, step = Point(-10, -12, -11, -11.5, 4, 5), 1e-5
    row = evaluate(name, point, {"beta": 0.2})
    figure = make_figure([row], point)
    (losses, slopes) = (axis.lines[0] for axis in figure.axes)
    x = torch.tensor(losses.get_xdata(), dtype=torch.float64)
    assert (x[0].item(), x[-1].item(), len(x)) == (-4, 4, 241)
    if name == "sigmoid":
        torch.testing.assert_close(torch.tensor(losses.get_ydata()), torch.log1p(torch.exp(-x)), rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.tensor(slopes.get_ydata()), -1 / (1 + torch.exp(x)), rtol=0, atol=1e-12)
    kinks = {"hinge": 1.0, "dpop": -0.1}.get(name)  # dpop: a = 0.25 + x / (2 beta) = 0
    for i in range(0, 241, 7):
        if kinks is None or abs(x[i] - kinks) > 1e-3:
            low, high = (p.loss for p in curve(row, point, [x[i].item() - step, x[i].item() + step]))
            quotient = (high - low) / (2 * step)
            assert slopes.get_ydata()[i] == pytest.approx(quotient, rel=1e-5, abs=1e-6), x[i]
    (here,) = curve(row, point, [row.margin])
    assert here.loss == pytest.approx(row.loss, rel=1e-12)
    assert here.margin == pytest.approx(row.margin, rel=1e-12)


def test_the_plot_reaches_the_given_point():
    point = Point(chosen=-200)
    row = evaluate("sigmoid", point, {})
    figure = make_figure([row], point)
    (low, high) = (figure.axes[0].lines[0].get_xdata()[i] for i in (0, -1))
    assert low < row.margin < high
    assert figure.axes[0].lines[1].get_xdata()[0] == row.margin


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("curves.pdf", "must end in .png"),
        ("curves", "must end in .png"),
        ("none/curves.png", "No such file or directory"),
        ("file/curves.png", "Not a directory"),
        ("folder.png", "Is a directory"),
    ],
)
def test_paths_that_cannot_be_written(cli, tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    refused(cli("losses", "--plot", tmp_path / name), message, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_plot_that_fails_leaves_the_old_file(cli, tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(self, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    refused(cli("losses", "--plot", path), "No space left on device")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("curves.png", b"old")]


def test_a_mistake_is_noticed_before_anything_is_written(cli, tmp_path):
    refused(
        cli("losses", "--plot", tmp_path / "x.png", "--loss", "sigmoid", "--rpo-alpha", 1), "does not use rpo_alpha"
    )
    assert not list(tmp_path.iterdir())


# A process of its own

IMPORTS = """
import sys
from lowlevel.cli import main
code = main(sys.argv[1:])
heavy = {"transformers", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib"}
print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("words", "imported"),
    [((), []), (("--loss", "ipo", "--json"), []), (("--beta", "x"), []), (("--plot", "x.png"), ["matplotlib"])],
)
def test_no_model_library_is_imported(tmp_path, words, imported):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lowlevel.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, "losses", *words],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == (2 if "x" in words else 0), done.stderr
    assert f"imported: {imported}" in done.stderr
    assert "\x1b" not in done.stdout
