"""step.py as a person runs it, at a tiny size on the CPU: one line a tool, the same tokens in all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cases import CASES, FIELDS, Case, Job, select
from benchmarks.meter import quantile
from benchmarks.runner import Runner, last_line, parse_sites, read_table, read_tables, write_table

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table(out):
    pytest.importorskip("trl")
    cases = ["lowlevel_sft_2x4_eager", "trl_sft_2x4"]
    command = [sys.executable, "-m", "benchmarks.step", "--shape", "tiny", "--steps", "6", "--warmup", "2"]
    done = subprocess.run(
        [*command, "--out", str(out), "--cases", *cases], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_table(out / "step.csv")
    assert [row["case"] for row in rows] == cases and set(rows[0]) == set(FIELDS)
    ours, trl = rows
    assert (ours["status"], trl["status"]) == ("ok", "ok")
    assert int(ours["tokens"]) == int(trl["tokens"]) > 0
    ours_losses, trl_losses = ([float(x) for x in row["losses"].split(";")] for row in (ours, trl))
    assert len(ours_losses) == 6 and ours["timed_steps"] == "4"
    assert ours_losses == pytest.approx(trl_losses, abs=0.01), "the same rows in the same order"
    assert ours_losses[0] == pytest.approx(trl_losses[0], abs=1e-4), "adapters start at zero: the same base"
    assert float(trl["padding_share"]) > 0
    assert "trl_sft_2x4" in done.stdout


def test_a_tool_that_fails_has_a_row_that_says_why(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first\necho 'ImportError: no GPU' >&2\nexit 3\n")
    python.chmod(0o755)
    runner = Runner(tmp_path, steps=2, warmup=1, cap_gib=15.0, timeout=60, sites={"unsloth": python})
    row = runner.run(select(["unsloth_sft_2x4"])[0], tmp_path / "workload", shape="tiny")
    assert row["status"] == "failed: exit code 3: ImportError: no GPU"
    assert (row["case"], row["tool"], row["cap_gib"]) == ("unsloth_sft_2x4", "unsloth", 15.0)


def test_select():
    assert {case.name for case in select([])} == {case.name for case in CASES if case.core}
    assert [case.name for case in select(["trl_dpo_2x4", "liger_*"])] == [
        "trl_dpo_2x4", "liger_sft_2x4", "liger_sft_8x1_nockpt",
    ]  # fmt: skip
    assert all(case.core for case in select(["lowlevel_*"])) and not select(["plain_sft_2x4"])[0].core
    with pytest.raises(SystemExit, match="no case 'nope'"):
        select(["nope"])
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_job_survives_its_file(tmp_path):
    job = Job(Case("x", "trl", "dpo", batch=8, dropout=0.0), "w", "s", "r", steps=3, warmup=1, cap_gib=15.0)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    assert job.case.setting == "8x4, checkpointing"  # DPO has no dropout in any tool


def test_quantile():
    assert quantile([3.0], 90) == 3.0
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 10) == pytest.approx(1.4)


def test_tables_of_several_runs(tmp_path):
    runs = [[("a", "ok", 1), ("b", "failed: x", 2)], [("a", "not run", 3), ("b", "ok", 4)], [("a", "ok", 5)]]
    for i, run in enumerate(runs):
        names = ("case", "status", "tokens")
        write_table(tmp_path / f"{i}.csv", [dict(zip(names, row, strict=True)) for row in run])
    rows = read_tables([tmp_path / f"{i}.csv" for i in range(3)])
    assert [(row["case"], row["tokens"]) for row in rows] == [("a", "5"), ("b", "4")]


def test_sites_and_logs(tmp_path):
    assert parse_sites([f"trl={tmp_path}"]) == {"trl": tmp_path}
    with pytest.raises(SystemExit, match="expected TOOL=PATH"):
        parse_sites(["nothing"])
    (tmp_path / "log").write_text("first\nValueError: x\n\n")
    assert last_line(tmp_path / "log") == "ValueError: x"
