"""A run folder whose parts are missing or not its own is refused by every command that uses it."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from workspace import alter_adapter

from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.running.reopening import load_run


def test_a_parent_that_is_not_the_runs_own_is_refused(runs, cli, tmp_path):
    copy = runs.space.copy("dpo", tmp_path)
    alter_adapter(copy / "parent")
    for command in (
        ("merge", copy, "--out", tmp_path / "merged"),
        ("generate", copy, "--prompt", "a"),
        ("compare", copy),
    ):
        said = cli(*command)
        assert (said.code, said.err.count("\n")) == (4, 1)
        assert "not the frozen adapter of this run" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["dpo"]


def test_a_base_that_is_not_the_runs_own_is_refused(runs, cli, tmp_path):
    copy = runs.space.copy("dpo", tmp_path)
    other = Path(shutil.copytree(runs.space.base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(runs.space.base), str(other)))
    with pytest.raises(CheckpointError, match="is not the one that was trained on"):
        load_run(copy)
    assert cli("compare", copy).code == 4


def test_a_folder_that_is_no_run(runs, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    empty, none = tmp_path / "empty", tmp_path / "none"
    generate = [("generate", folder, "--prompt", "a") for folder in (empty, none)]
    for command in (("merge", empty, "--out", tmp_path / "x"), ("compare", empty), *generate):
        said = cli(*command)
        assert (said.code, said.err.count("\n")) == (2, 1), said.err
    unfinished = runs.space.copy("dpo", tmp_path)
    shutil.rmtree(unfinished / "adapter")
    said = cli("merge", unfinished, "--out", tmp_path / "x")
    assert (said.code, "the run has not finished; --resume continues it" in said.err) == (2, True)
    with pytest.raises(ConfigError, match="has not finished"):
        load_run(unfinished)
    said = cli("generate", unfinished, "--prompt", "a", "--max-new-tokens", 2)
    assert said.code == 0 and "note: step-00000006, the newest checkpoint" in said.err, said.err
