"""Commands that write, on a disk that is full or cannot be written: one line, and nothing half-written."""

import os
import resource

import pytest

WRITES = {
    "merge": ("merge", "--out"),
    "export": ("export", "--to", "vllm", "--out"),
    "export gguf": ("export", "--to", "gguf-adapter", "--out"),
    "inspect": ("inspect", "--step", 1, "--html"),
    "replay": ("replay", "--step", 1, "--dump"),
    "verify": ("verify", "--json"),
    "compare": ("compare",),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk(runs, cli, tmp_path, name):
    command, *words = WRITES[name]
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # Python ignores SIGXFSZ: the write fails
    try:
        said = cli(command, runs.dpo, *words, *([out] if words else []))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    written = str(out if words else runs.dpo)
    assert said.code == 4 and said.err.startswith(f"error: {written}") and said.err.count("\n") == 1, said.err
    assert not list(tmp_path.iterdir()) and not list(runs.dpo.rglob(".tmp-*"))


@pytest.mark.parametrize("name", ["merge", "export", "inspect", "verify"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(runs, cli, tmp_path, monkeypatch, name):
    command, *words = WRITES[name]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        said = cli(command, runs.dpo, *words, tmp_path / "out")
    assert said.code == 2 and "cannot be written" in said.err and said.err.count("\n") == 1
    assert not said.out and not list(tmp_path.iterdir())
