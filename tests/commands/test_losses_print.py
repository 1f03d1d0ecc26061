"""What `lowlevel losses` prints: nothing is cut, every digit and sign is there."""

import re

import pytest
from losses_table import LOGPS, P, by_name, shown, table_of

from lowlevel.losses import LOSSES


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
