"""runs/lowlevel.ipynb runs from its first to its last cell, and its install cell keeps the installed torch."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

NOTEBOOK = Path(__file__).parents[2] / "runs" / "lowlevel.ipynb"


def text_of(cell) -> str:
    data = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join("".join(part) for part in data)


def key_outputs(cells) -> None:
    text = "".join(text_of(cell) for cell in cells if cell["cell_type"] == "code")
    assert "50 of 50 checks hold" in text and "FAIL" not in text
    assert text.count("identical\n") == 3  # the steps of ll.steps and of the run; replayed: its log, all of it
    assert "sum of contributions" in text and "full sentences" in text and "stopped" in text


def test_the_committed_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 200_000
    key_outputs(code)


@pytest.mark.slow
def test_every_cell_runs_in_an_empty_folder(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    key_outputs(notebook.cells)


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        ("2.11.0+cu128", "2.11.0+cu128", 0, "installed; torch 2.11.0+cu128 is kept"),
        ("2.10.0", "2.13.0", 0, "torch 2.10.0 was replaced by 2.13.0 (lowlevel needs 2.11 or newer): restart"),
        (None, "2.13.0", 0, "installed, with torch 2.13.0"),
        ("2.11.0", "2.11.0", 1, "somewhere was not installed: no such file."),
    ],
)
def test_the_first_cell_keeps_torch(monkeypatch, capsys, before, after, code, said):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cell = "".join(next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")["source"])
    versions, pinned, names = iter([before, after, after]), [], {}

    def pip(command, **_):
        pinned.append(Path(command[command.index("--constraint") + 1]).read_text())
        return SimpleNamespace(returncode=code, stderr="line\nno such file")

    exec(cell, names)  # lowlevel is there: nothing is installed
    names["torch_version"] = lambda: next(versions)
    monkeypatch.setattr(subprocess, "run", pip)
    try:
        names["install"]("somewhere")
    except SystemExit as end:
        print(end)
    assert said in capsys.readouterr().out
    assert pinned == [f"torch=={before}\n" if before and before >= "2.11" else ""]
    assert sys.modules["lowlevel"]
