"""Runs to report on: with a trace of tokens, without one, and sft."""

from pathlib import Path

import pytest
from workspace import Workspace, make_workspace, run


@pytest.fixture
def no_pngs(monkeypatch) -> None:
    """Pages only: drawing a dozen PNG files takes longer than the rest of a report."""
    monkeypatch.setattr("lowlevel.reporting.report.plot_panels", lambda *_, **__: [])


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("reporting")
    return make_workspace(folder)


@pytest.fixture(scope="session")
def runs(space) -> dict[str, Path]:
    train = {"max_steps": 6, "logging_steps": 1}
    held_out = {"eval_source": "holdout", "eval_limit": 4}
    files = {
        "sft": space.write("sft", "sft", train=train),
        "dpo": space.write(
            "dpo", "dpo", train={**train, "learning_rate": 0.05}, data=held_out, trace={"every": 1, "level": "token"}
        ),
        "plain": space.write("plain", "dpo", train=train),
    }
    for name, file in files.items():
        said = run("sft" if name == "sft" else "dpo", file)
        assert said.code == 0, said.err
    return {name: space.folder / name for name in files}
