"""memory.py on the rows of a table: each by its own plan, beside what was measured."""

import sys
from pathlib import Path

import pytest

from benchmarks.cases import FIELDS
from benchmarks.memory import compare, main, read_plan
from benchmarks.runner import read_table, write_table
from lowlevel.model.memory import Plan

ROOT = Path(__file__).parents[2]
H100 = ROOT / "benchmarks" / "results" / "step_h100.csv"


def test_a_plan_is_read_as_written():
    assert read_plan("positions=4096 recomputed=22 dequantize_once=0") == Plan(4096, 22, False)
    assert read_plan("positions=512 recomputed=0 dequantize_once=1") == Plan(512, 0, True)


def test_the_measured_peaks_of_the_h100(tmp_path):
    rows = compare(read_table(H100), tmp_path)
    assert len(rows) == len(read_table(H100)) >= 9
    for row in rows:
        assert abs(row["error"]) < 0.02, row["case"]
        named = list(row)[list(row).index("error") + 1 : -2]
        assert sum(row[name] for name in named) == pytest.approx(row["forecast_gib"], abs=0.005)


def test_rows_without_numbers_or_a_plan_are_left_out(tmp_path):
    one = next(row for row in read_table(H100) if row["case"] == "lowlevel_sft_2x4_graphed")
    changed = [{**one, "plan": ""}, {**one, "status": "failed: x"}, {**one, "case": "of another time"}]
    assert compare(changed, tmp_path) == []
    (doubled,) = compare([{**one, "peak_allocated_gib": str(2 * float(one["peak_allocated_gib"]))}], tmp_path)
    assert doubled["error"] == pytest.approx(-0.5, abs=0.01)


def test_the_command(drawn, tmp_path, monkeypatch, capsys):
    command = ["benchmarks.memory", "--out", str(tmp_path), "--table", str(tmp_path / "two.csv")]
    monkeypatch.setattr(sys, "argv", command)
    rows = read_table(H100)[:2]
    write_table(tmp_path / "two.csv", rows, FIELDS)
    main()
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("largest error ") and said.count(" GiB, forecast ") == 2
    assert [row["case"] for row in read_table(tmp_path / "memory.csv")] == [row["case"] for row in rows]
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
    write_table(tmp_path / "two.csv", [{**rows[0], "plan": ""}], FIELDS)
    with pytest.raises(SystemExit, match="no measured row says its plan"):
        main()
