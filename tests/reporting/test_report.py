"""The report: curves as logged, pairs as traced, the alarm, and a page that a browser shows without a complaint."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from contrast import check_page, keep, show_as
from workspace import metrics, run

from lowlevel.checkpoints.tables import write_table
from lowlevel.reporting.displaced import pair_tables, token_falls
from lowlevel.reporting.report import measured_tables, render
from lowlevel.reporting.series import chart, number, ticks
from lowlevel.running.plots import Curve, Panel, fallen, panels

LOOKS = {"light": (1280, False), "dark": (1280, True), "phone": (390, False)}


def rows_of(*margins, step=1, **columns):
    """Columns of a pairs table: chosen log-ratio 10 times the margin, rejected 0, unless given."""
    size = len(margins)
    made = {
        "step": [step] * size,
        "row": list(range(size)),
        "margin": list(margins),
        "chosen_logratio": [10 * margin for margin in margins],
        "rejected_logratio": [0.0] * size,
        "weight": [0.5] * size,
        "loss": [0.7] * size,
    }
    return made | columns


def test_curves_are_what_was_logged(runs):
    logged = metrics(runs["dpo"])
    made = {panel.name: panel for panel in panels([("dpo", logged)])}
    training, held_out = made["loss"].curves
    assert training.points == tuple((r["step"], r["loss"]) for r in logged if "loss" in r)
    assert held_out.points == tuple((r["step"], r["eval_loss"]) for r in logged if "eval_loss" in r)
    assert [curve.label for curve in made["chosen_logps"].curves] == ["policy", "reference"]
    assert {"learning_rate", "tokens_per_second", "padding_share"} <= set(made)
    assert not {"memory", "skipped_steps", "loss_scale"} & set(made)  # a CPU in fp32 has none of them


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ([0.1, -0.2, 0.0], None),
        ([0.1, -0.2, -0.5], "from step 2 on, by 0.5 at the end"),
        ([-0.1, -0.2, -0.5], "from step 1 on"),
        ([], None),
    ],
)
def test_an_alarm_where_the_chosen_stay_below_their_reference(changes, alarm):
    records = [
        {"step": i + 1, "logps/chosen": change - 7, "logps/ref_chosen": -7.0} for i, change in enumerate(changes)
    ]
    said = fallen([*records, {"step": 9, "eval_loss": 1.0}])
    assert said is None if alarm is None else alarm in said


def test_memory_and_loss_scale_of_an_fp16_run_and_no_number_that_is_not_finite():
    records = [
        {"step": i, "loss": loss, "loss_scale": 65536.0 / i, "skipped_steps": i, "peak_allocated_gib": 1.5}
        for i, loss in ((1, 0.5), (2, float("nan")), (3, 0.25))
    ]
    made = {panel.name: panel for panel in panels([("run", records)])}
    assert {"memory", "loss_scale", "skipped_steps"} <= set(made)
    assert made["loss"].curves[0].points == ((1, 0.5), (3, 0.25))


def test_a_chart_puts_points_where_they_belong():
    made = chart(Panel("x", "X", "", "", (Curve("a", ((0, 0.0), (10, 1.0)), 0, 0),), level=(0.5, "middle")))
    (x0, y0), (x1, y1) = re.findall(r"([\d.]+) ([\d.]+)", made.lines[0].path)
    assert (x0, x1) == ("0.0", "100.0")
    assert float(y0) == pytest.approx(100 * 1.06 / 1.12, abs=0.01) and float(y1) == pytest.approx(
        100 - float(y0), abs=0.02
    )
    assert made.level == 50.0
    assert [tick.at for tick in made.y_ticks] == sorted((tick.at for tick in made.y_ticks), reverse=True)
    assert ticks(0, 60) == [0, 20, 40, 60] and ticks(-0.4, 0.2)[-1] == pytest.approx(0.2)
    assert (number(-0.5), number(12345.6), number(2e-5)) == ("−0.5", "12,346", "2e−05")
    close = chart(Panel("x", "X", "", "", (Curve("a", ((0, 0.99998), (10, 1.00002)), 0, 0),)))
    assert [tick.label for tick in close.y_ticks] == ["0.99998", "1", "1.00002"]


@pytest.mark.parametrize("points", [((1, 0.5),), ((1, 0.5), (2, 0.5))])
def test_one_point_and_a_constant_can_be_drawn(points):
    made = chart(Panel("x", "X", "", "", (Curve("a", points, 0, 0),)))
    assert made.y_ticks and "nan" not in made.lines[0].path


def test_colours_are_of_curves_in_one_run_and_of_runs_in_several():
    curves = tuple(Curve("a", ((0, 1.0), (1, 2.0)), run, kind) for run in (0, 1) for kind in (0, 1))
    assert [(line.colour, line.dash) for line in chart(Panel("x", "X", "", "", curves)).lines] == [
        (0, 0), (0, 1), (1, 0), (1, 1)
    ]  # fmt: skip
    assert [line.colour for line in chart(Panel("x", "X", "", "", curves[:2])).lines] == [0, 1]


def test_best_and_worst_and_who_fell_below_the_reference(tmp_path):
    columns = rows_of(
        *(0.3, -0.2, 0.1, -0.4, 0.5, 0.0),
        chosen_logratio=[-1.0, 1.0, 1.0, -1.0, -2.0, 1.0],
        rejected_logratio=[-4.0, 3.0, 0.0, 3.0, -7.0, -1.0],
    )
    write_table(tmp_path, "pairs", columns)
    tables = pair_tables(tmp_path)
    assert [row["row"] for row in tables.worst] == [3, 1, 5] and [row["row"] for row in tables.best] == [4, 0, 2]
    assert (tables.below, tables.both_fell, tables.count, tables.alarm) == (3, 2, 6, False)


def test_only_the_last_traced_steps_count_and_a_row_as_it_was_last_seen(tmp_path):
    write_table(tmp_path, "pairs", rows_of(*[-1.0] * 70, step=1))
    write_table(tmp_path, "pairs", rows_of(*[1.0] * 40, step=5))
    write_table(tmp_path, "pairs", rows_of(*[-0.5] * 50, step=9))
    tables = pair_tables(tmp_path)
    assert (tables.first, tables.last, tables.count, tables.below) == (1, 9, 70, 70) and tables.alarm
    assert (tables.worst[0]["margin"], tables.best[0]["margin"], tables.best[0]["step"]) == (-1.0, -0.5, 9)
    write_table(tmp_path, "pairs", rows_of(*[1.0] * 64, step=10))
    assert (pair_tables(tmp_path).first, pair_tables(tmp_path).below) == (10, 0)


def test_tokens_that_lost_most():
    rows = [
        {
            "chosen_token_ids": [7, 8, 7],
            "chosen_token_logps": [-2.0, -1.0, -4.0],
            "chosen_ref_token_logps": [-1.0, -1.5, -1.0],
        },
        {"chosen_token_ids": [9], "chosen_token_logps": [-2.0], "chosen_ref_token_logps": [-1.5]},
        {"chosen_token_ids": None},
    ]  # fmt: skip
    assert [(fall.token, fall.change, fall.positions) for fall in token_falls(rows)] == [(7, -4.0, 2), (9, -0.5, 1)]


def test_a_report_names_the_commands_and_agrees_with_the_trace(runs):
    said = run("report", runs["dpo"])
    assert said.code == 0, said.err
    page = (runs["dpo"] / "report.html").read_text()
    rows = [row for path in (runs["dpo"] / "trace").glob("pairs-*") for row in pq.read_table(path).to_pylist()]
    newest = {row["row"]: row for row in sorted(rows, key=lambda row: row["step"])}
    worst = min(newest.values(), key=lambda row: row["margin"])
    assert f"lowlevel inspect {runs['dpo']} --example {worst['row']}" in page
    assert '<th scope="col">chosen weight</th>' in page and ">step 0</span>" in page
    assert (
        "not less" not in page
        and f"{sum(r['chosen_logratio'] < 0 for r in newest.values())} of {len(newest)} pairs" in page
    )
    pngs = {path.stem for path in (runs["dpo"] / "report").glob("*.png")}
    assert {"loss", "rewards", "margin", "accuracy", "chosen_logps", "rejected_logps", "learning_rate"} <= pngs
    assert "http" not in re.sub(r"http-equiv", "", page) and "<script" not in page


@pytest.mark.usefixtures("no_pngs")
def test_without_a_trace_it_says_what_one_would_add(runs):
    assert run("report", runs["plain"]).code == 0
    page = (runs["plain"] / "report.html").read_text()
    assert "trace.every" in page and "Likelihood displacement" not in page
    assert run("report", runs["sft"]).code == 0
    assert "No trace" not in (runs["sft"] / "report.html").read_text()


@pytest.mark.usefixtures("no_pngs")
def test_the_number_of_gpus_is_named(runs, tmp_path):
    folder = shutil.copytree(runs["plain"], tmp_path / "run")
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, "ranks": 2}))
    assert run("report", folder).code == 0
    assert re.search(r"GPUs</[a-z]+>\s*<[a-z]+>2<", (folder / "report.html").read_text())


@pytest.mark.usefixtures("no_pngs")
def test_runs_beside_each_other(runs):
    assert run("report", runs["plain"], "--compare", runs["dpo"], runs["sft"]).code == 0
    page = (runs["plain"] / "report.html").read_text()
    assert "plain: training" in page and "dpo: training" in page and "sft: training" in page
    said = run("report", runs["plain"], "--compare", runs["plain"].parent / "none")
    assert said.code == 2 and "is not a run folder" in said.err
    assert run("report", runs["plain"].parent).code == 2


@pytest.mark.usefixtures("no_pngs")
def test_an_inspection_page_in_the_run_folder_is_linked(runs, tmp_path):
    folder = Path(shutil.copytree(runs["dpo"], tmp_path / "dpo"))
    row = pair_tables(folder / "trace").worst[0]["row"]
    (folder / "row.html").write_text(f'<p>lowlevel inspect</p><article id="row-{row}">')
    assert run("report", folder).code == 0
    assert f'<a href="row.html#row-{row}">{row}</a>' in (folder / "report.html").read_text()


def test_a_damaged_trace_is_one_line(runs, tmp_path):
    folder = Path(shutil.copytree(runs["dpo"], tmp_path / "dpo"))
    (folder / "trace/pairs-00000009-00000009.parquet").write_text("no parquet")
    said = run("report", folder)
    assert said.code == 4 and "pairs-00000009" in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("refused", ["report.html", "loss.png"])
def test_pages_and_charts_are_replaced_whole_or_not_at_all(runs, drawn, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("lowlevel.reporting.report.panels", lambda runs: panels(runs)[:1])  # the loss
    folder = Path(shutil.copytree(runs["plain"], tmp_path / "plain"))
    files = [folder / "report.html", folder / "report" / "loss.png"]
    (folder / "report").mkdir(exist_ok=True)
    for file in files:
        file.write_text("old")
    original = os.replace

    def replace(source, target):
        if Path(target).name == refused:
            raise OSError(28, "No space left on device")
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        said = run("report", folder)
    (file,) = [file for file in files if file.name == refused]
    assert (said.code, said.err) == (4, f"error: {file}: No space left on device\n")
    assert {file.name: file.read_bytes() == b"old" for file in files}[refused]
    assert not list(folder.rglob(".tmp-*"))
    for file in files:
        file.with_name(f".tmp-{file.name}-4194305").write_text("half, of a killed process")
    assert run("report", folder).code == 0
    assert not list(folder.rglob(".tmp-*"))
    assert files[0].read_bytes().startswith(b"<!doctype html>") and files[1].read_bytes().startswith(b"\x89PNG")


def test_texts_are_escaped():
    bad = "<img src=x onerror=alert(1)>"
    panel = Panel("x", bad, bad, bad, (Curve(bad, ((0, 1.0), (1, 2.0)), 0, 0),))
    empty = dict.fromkeys(("pair_tables", "displaced", "tokens", "pages"))
    page = render([panel], title=bad, folder=bad, command=bad, facts=[(bad, bad)], missing=bad, measured=[], **empty)
    assert "<img" not in page


@pytest.mark.usefixtures("no_pngs")
def test_the_page_in_a_browser(browser, runs):
    assert run("report", runs["dpo"], "--compare", runs["plain"]).code == 0
    for look, (width, dark) in LOOKS.items():
        check_look(browser, runs, look, width, dark)


def check_look(browser, runs, look, width, dark):
    show_as(browser, (width, 900), dark)
    browser.get((runs["dpo"] / "report.html").as_uri())
    ask = browser.execute_script
    check_page(browser)
    paper = ask("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 128) == dark
    strokes = ask("return [...document.querySelectorAll('.curve')].map(e => getComputedStyle(e).stroke)")
    keys = ask("return [...document.querySelectorAll('.keys i')].map(e => getComputedStyle(e).borderTopColor)")
    assert strokes == keys and len(set(strokes)) == 2
    boxes = ask("return [...document.querySelectorAll('.curve')].map(e => [e.getBBox().y, e.getBBox().height])")
    assert all(top >= 0 and top + height <= 100 for top, height in boxes)
    keep(browser, f"report-{look}")


def test_data_stages_and_samples(tmp_path):
    replies = {name: [{"text": f" {name} {i}\n"} for i in range(7)] for name in ("base", "sft")}
    compared = {"scores": {"base": {"pair_accuracy": 0.5}, "sft": {"pair_accuracy": 0.75}}, "replies": replies}
    (tmp_path / "compare.json").write_text(json.dumps(compared))  # an older one, without prompts
    assert [table.title for table in measured_tables(tmp_path)] == ["Stages"]
    (tmp_path / "compare.json").write_text(json.dumps({**compared, "prompts": [f"ask {i}" for i in range(7)]}))
    part = {"source": "a.jsonl", "rows_read": 1200, "rows_kept": 1000, "tokens": {"total": 9, "supervised": 4}}
    (tmp_path / "data_report.json").write_text(json.dumps({"train": part, "evaluation": None}))
    data, stages, samples = measured_tables(tmp_path)
    assert data.rows == [["training", "a.jsonl", "1,200", "1,000", "9", "4", "-"]]
    assert stages.rows == [["base", "50.0%"], ["sft", "75.0%"]]
    assert samples.rows == [[f"ask {i}", f"base {i}", f"sft {i}"] for i in range(5)]
