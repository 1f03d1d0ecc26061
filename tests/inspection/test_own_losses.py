"""Custom losses in `inspect`, traces and reports: the numbers of their run, whatever they read."""

import math
from dataclasses import replace

import helpers
import pytest
import sample_losses
import torch
from rich.console import Console
from samples import inspection_of_pairs, pairs
from workspace import CHATS, PAIRS, make_workspace, metrics, run

import lowlevel.losses.registry
from lowlevel.checkpoints.tables import read_table
from lowlevel.inspection.opening import inspect_run
from lowlevel.inspection.page import render_page
from lowlevel.inspection.pairs import inspect_pairs
from lowlevel.inspection.reading import formula, settings
from lowlevel.inspection.terminal import print_inspection
from lowlevel.losses import loss
from lowlevel.running.reopening import reopen

STEPS = 3
LOSSES = {
    "weighted": {"loss_type": "sample_losses:weighted", "beta": 0.4, "loss_kwargs": {"gamma": 0.5}},
    "all_tokens": {"loss_type": "sample_losses:all_tokens", "beta": 0.4},
    "registered": {"loss_type": "registered"},
    "focal": {"loss_type": "sample_losses:focal", "loss_kwargs": {"power": 1.5}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of `LOSSES`, each step logged, saved and traced; the rows have a column "score"."""
    space = make_workspace(tmp_path_factory.mktemp("own"))
    for path, rows in ((space.sft_rows, CHATS), (space.dpo_rows, PAIRS)):
        helpers.write_jsonl(path, [{**row, "score": 0.5 + i % 3} for i, row in enumerate(rows)])
    train = {"logging_steps": 1, "save_steps": 1, "save_total_limit": 9, "max_steps": STEPS}
    trace = {"every": 1, "level": "token", "gradients": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowlevel.losses.registry, "OWN", {})
        loss(sample_losses.chosen_only, name="registered")
        for name, settings in LOSSES.items():
            method = "sft" if name == "focal" else "dpo"
            more = {method: settings, "data": {"columns": ["score"]}, "lora": {"lora_dropout": 0.0}}
            said = run(method, space.write(name, method, train=train, trace=trace, **more))
            assert said.code == 0, said.err
        yield {name: space.folder / name for name in LOSSES}


def said(inspection) -> str:
    console = Console(record=True, quiet=False, file=open("/dev/null", "w"), width=250)  # noqa: SIM115
    print_inspection(inspection, console)
    return console.export_text()


@pytest.mark.parametrize("name", LOSSES)
def test_an_inspected_step_has_the_numbers_that_were_logged(runs, name):
    opened = reopen(runs[name], lambda line: None)
    logged = {record["step"]: record for record in metrics(runs[name])}
    for step in range(1, STEPS + 1):
        found = inspect_run(opened, step=step)
        assert found.loss == pytest.approx(logged[step]["loss"], rel=1e-5, abs=1e-5)
        metric = {"weighted": "reached", "focal": "confidence"}.get(name)
        if metric:  # of a pair, or of a token
            total = sum(float(x.texts[0].columns[metric].sum()) if name == "focal" else x.numbers[f"metric/{metric}"]
                        for x in found.examples)  # fmt: skip
            assert total / found.count == pytest.approx(logged[step][metric], rel=1e-5, abs=1e-5)
        assert all(x.numbers["column/score"] == 0.5 + x.row % 3 for x in found.examples)


def test_formula_and_name_of_a_custom_loss_are_shown(runs):
    for name, text in (
        ("weighted", "sample_losses:weighted, β 0.4, gamma 0.5"),
        ("registered", "registered, β 0.1"),
        ("focal", "sample_losses:focal, power 1.5"),
    ):
        found = inspect_run(reopen(runs[name], lambda line: None), step=1)
        spec = found.method.spec
        first = getattr(sample_losses, "chosen_only" if name == "registered" else name).__doc__.split("\n")[0]
        assert settings(found.method) == text and formula(spec) == first
        page = render_page(found)
        assert all(part in page for part in (first.replace("'", "&#39;"), spec.paper, "score"))
        assert (f"{spec.name}: {spec.paper}" in said(found) and first in said(found)) or name == "focal"


def test_the_focal_loss_of_each_token(runs):
    found = inspect_run(reopen(runs["focal"], lambda line: None), step=STEPS)
    for record in found.examples:
        p = record.texts[0].columns["logp"].exp()
        columns, score = record.texts[0].columns, record.numbers["column/score"]
        assert torch.allclose(columns["loss"], -((1 - p) ** 1.5) * p.log() * score, atol=1e-5)
        assert torch.allclose(columns["confidence"], p)
        assert float(columns["share"].sum()) == pytest.approx(1, abs=1e-5)
    text = said(found)
    assert "confidence" in text and "column/score 0.5000" in text


def test_the_weight_of_a_loss_of_the_margin(policy):
    """Slopes of -score ls(x - gamma), by hand."""
    method = replace(helpers.dpo(beta=0.4, **{k: LOSSES["weighted"][k] for k in ("loss_type", "loss_kwargs")}),
                     columns=("score",))  # fmt: skip
    rows = [replace(pair, values=(1.0 + i,)) for i, pair in enumerate(pairs())]
    for record, row in zip(inspect_pairs(policy, method, rows), rows, strict=True):
        expected = row.values[0] * float(torch.sigmoid(torch.tensor(0.5 - record.numbers["margin"])))
        assert float(record.values("weight")[0]) == pytest.approx(expected, rel=1e-4)
        assert float(record.values("weight")[-1]) == pytest.approx(expected, rel=1e-4)
        assert record.numbers["metric/reached"] == float(record.numbers["margin"] > 0.5)
        assert record.numbers["column/score"] == row.values[0]
        assert {"column/score", "metric/reached"} <= set(record.equation)


def test_a_loss_of_one_completion_has_no_weight_for_the_other(policy):
    for record in inspect_pairs(policy, helpers.dpo(loss_type="sample_losses:chosen_only", beta=0.4), pairs()):
        assert (float(record.values("weight")[0]), float(record.values("weight")[-1])) == (pytest.approx(1.0), 0.0)
        assert float(record.loss) == pytest.approx(-0.4 * float(record.texts[0].numbers["policy"]), rel=1e-6)


def test_a_loss_of_tokens_has_no_weights_and_shows_a_dash(policy, pieces):
    found = inspection_of_pairs(policy, pieces, loss_type="sample_losses:all_tokens", beta=0.4)
    for record in found.examples:
        assert all(math.isnan(weight) for weight in record.values("weight"))
        clipped = [side.columns["log-ratio"].clamp(-1, 1).sum() for side in record.texts]
        assert float(record.loss) == pytest.approx(
            float(-torch.nn.functional.logsigmoid(0.4 * (clipped[0] - clipped[1]))), rel=1e-5
        )
    for text in (said(found), render_page(found)):
        assert "–" in text and "nan" not in text.replace("<script", "").lower().replace("javascript", "")


def test_a_trace_holds_losses_metrics_and_both_gradient_terms(runs):
    for name in ("weighted", "all_tokens", "registered"):
        rows = read_table(runs[name] / "trace", "pairs").to_pylist()
        steps = read_table(runs[name] / "trace", "steps").to_pylist()
        logged = {record["step"]: record for record in metrics(runs[name])}
        for line in steps:
            losses = [row["loss"] for row in rows if row["step"] == line["step"]]
            assert sum(losses) / len(losses) == pytest.approx(logged[line["step"]]["loss"], rel=1e-5, abs=1e-6)
            assert line["chosen_grad_norm"] > 0
            assert (line["rejected_grad_norm"] < 1e-4 * line["chosen_grad_norm"]) == (name == "registered")
        assert all((row["weight"] != row["weight"]) == (name == "all_tokens") for row in rows)
        assert all(row.get("metrics/reached") in ((0.0, 1.0) if name == "weighted" else (None,)) for row in rows)


@pytest.mark.parametrize("name", LOSSES)
def test_a_report_draws_metrics_and_shows_a_dash_for_no_weight(runs, monkeypatch, name):
    drawn = []
    monkeypatch.setattr("lowlevel.reporting.report.plot_panels", lambda panels, *_, **__: drawn.extend(panels))
    told = run("report", runs[name])
    assert told.code == 0, told.err
    page = (runs[name] / "report.html").read_text(encoding="utf-8")
    metric = {"weighted": "reached", "focal": "confidence"}.get(name)
    own = {panel.name: panel.title for panel in drawn if panel.name.startswith("metric_")}
    assert own == ({f"metric_{metric}": metric} if metric else {})
    assert metric is None or f"<h3>{metric}</h3>" in page
    assert ("<td>–</td>" in page) == (name == "all_tokens") and ">nan<" not in page
