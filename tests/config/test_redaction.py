"""Secrets in the environment, in URLs and in exceptions reach no file and no stream, in runs that end well or badly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workspace import CHATS, make_workspace, run

import lowlevel.commands.data
import lowlevel.running.training
from lowlevel.config.file import load_config
from lowlevel.errors import ConfigError, DataError, NonFiniteError
from lowlevel.redaction import REDACTED, holds_secret, redact

# written in pieces, so that no scan for secrets finds one here
HUB = "hf_" + "aB3" * 10
SECRETS = {
    "HF_TOKEN": HUB,
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "MY_SECRET": "correct horse battery",
    "DB_PASSWORD": "pass.word(1",
    "PIP_INDEX_TOKEN": "pass.word(1-and-more",
}
URL = "https://someone:" + "s3cr3t-in-url" + "@host.example/models"
NEEDLES = [*SECRETS.values(), "s3cr3t-in-url"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HARMLESS", "not secret at all")
    monkeypatch.setenv("SHORT_KEY", "1")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("secrets"))


def clean(text: str) -> None:
    assert [needle for needle in NEEDLES if needle in text] == []


def clean_tree(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert [needle for needle in NEEDLES if needle.encode() in content] == [], path
    return len(files)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token {HUB}.", f"token {REDACTED}."),
        ("hf_" + "Zz9" * 12, REDACTED),
        (f"cannot reach {URL}/x", f"cannot reach https://{REDACTED}@host.example/models/x"),
        ("git+ssh://me@host/x", f"git+ssh://{REDACTED}@host/x"),
        ("the password is pass.word(1-and-more", f"the password is {REDACTED}"),
        ("loss 1.0, not secret at all, a@b.c, https://host/a@b, hf_hub", None),
    ],
)
def test_what_is_redacted_and_what_is_not(text, expected):
    assert redact(text) == (text if expected is None else expected)
    assert holds_secret(text) == (expected is not None)


@pytest.mark.parametrize("value", [URL, HUB, SECRETS["MY_SECRET"]])
@pytest.mark.parametrize("key", ["model.name", "data.source", "train.output_dir", "lora.init_from"])
def test_a_run_file_that_holds_a_secret_is_refused(key, value):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {key: value})
    assert str(caught.value) == (
        f"flags: {key}: holds a password or token; set HF_TOKEN or log in with `hf auth login` instead"
    )


def test_a_secret_in_a_filter_or_a_wrong_place_is_not_repeated(space, tmp_path):
    filters = [{"column": "prompt", "op": "in", "value": ["a", HUB]}]
    said = run("data", space.write("run", "sft", folder=tmp_path, data={"filters": filters}))
    assert (said.code, said.err.count("data.filters.value: holds a password or token")) == (2, 1)
    wrong = run("data", space.write("run", "sft", folder=tmp_path, train={"seed": URL}))
    assert (wrong.code, REDACTED in wrong.err) == (2, True)
    clean(said.err + wrong.err)


def test_runs_that_end_well_and_badly_leave_no_secret(space, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    bad = {"messages": [{"role": SECRETS["WANDB_API_KEY"], "content": "x"}]}
    odd = {"messages": [{**CHATS[0]["messages"][0], SECRETS["MY_SECRET"]: 1}, CHATS[0]["messages"][1]]}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*CHATS, bad, odd]), encoding="utf-8")
    data, quick = {"source": str(rows), "on_bad_row": "skip"}, {"max_steps": 2, "save_steps": 1}
    good = run("sft", space.write("good", "sft", folder=tmp_path, data=data, train=quick))
    assert good.code == 0, good.err
    clean(good.out + good.err)

    def fail(*args, **keys):
        raise NonFiniteError(f"loss is nan near {URL} with {HUB}", step=1)

    monkeypatch.setattr(lowlevel.running.training, "train", fail)
    failed = run("sft", space.write("failed", "sft", folder=tmp_path, data=data, train=quick))
    assert (failed.code, REDACTED in failed.err) == (5, True)
    status = (tmp_path / "failed" / "run-status.json").read_text()
    assert REDACTED in status
    clean(failed.out + failed.err)
    rows.unlink()
    assert clean_tree(tmp_path) > 20
    adapter = json.loads((tmp_path / "good" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(space.base)
    for path in (tmp_path / "good").rglob("*"):  # the place of the base is in config.toml and in the result alone
        named = path.name in ("config.toml", "README.md") or path.parent.name == "adapter"
        if path.is_file() and path.suffix in (".json", ".jsonl", ".jinja", ".md"):
            assert named or str(space.folder) not in path.read_text(), path
    checkpoint = json.loads((tmp_path / "good" / "step-00000002" / "adapter_config.json").read_text())
    assert checkpoint["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", [DataError, RuntimeError, torch.cuda.OutOfMemoryError])
def test_no_error_line_or_traceback_shows_a_secret(space, tmp_path, monkeypatch, debug, kind):
    def fail(config, console):
        print(f"on the way: {URL}")
        console.print(f"through rich: {HUB}")
        raise kind(f"{URL} said {SECRETS['DB_PASSWORD']}")

    monkeypatch.setattr(lowlevel.commands.data, "show_data", fail)
    said = run("data", space.write("run", "sft", folder=tmp_path), *["--debug"] * debug)
    assert said.code in (1, 3, 6)
    assert ("Traceback" in said.err) == debug
    assert said.out.count(REDACTED) == 2
    assert said.err.count(REDACTED) >= 2
    clean(said.out + said.err)


def test_a_process_of_its_own_shows_none_either(tmp_path):
    command = [sys.executable, "-m", "lowlevel", "sft", str(tmp_path / "none.toml"), "--model.name", URL, "--debug"]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=120)
    assert said.returncode == 2
    assert "Traceback" in said.stderr
    clean(said.stdout + said.stderr)
