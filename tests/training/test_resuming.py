"""What may differ between a checkpoint and the run that goes on from it, and what is said where it may not."""

import json
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path

import helpers
import pytest
from workspace import CHATS, Workspace, make_workspace, metrics, run, status, stop_at

from lowlevel.checkpoints.checkpoint import _payload_sha256, checkpoints, verify
from lowlevel.durable import write_json

STOP = 3


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    """A workspace with a run that SIGTERM stopped after step 3 of 6."""
    space = make_workspace(tmp_path_factory.mktemp("resuming"))
    data = {"eval_source": "holdout", "eval_limit": 4}
    path = space.write("stopped", "sft", train={"logging_steps": 1, "save_steps": 1}, data=data)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, STOP)
        assert run("sft", path).code == 143
    return space


def edit_payload(checkpoint: Path, section: str, **values: object) -> None:
    """Change a checkpoint's manifest as another machine would have written it."""
    payload = verify(checkpoint)
    payload[section].update(values)
    write_json(checkpoint / "manifest.json", {"payload": payload, "payload_sha256": _payload_sha256(payload)})


def content(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize("saved", ["", "dequantize_once = false\n", "dequantize_once = true\n"])
def test_a_run_that_says_how_it_dequantised_goes_on_with_the_default(resume, copied, saved):
    """On a CPU the copy changes no bit; true was a choice, and is one still."""
    text = (copied / "config.toml").read_text()
    assert "dequantize_once" not in text
    (copied / "config.toml").write_text(text.replace("[train]\n", f"[train]\n{saved}"))
    assert resume().code == (2 if "true" in saved else 0)


def test_all_differences_come_at_once_and_nothing_is_touched(resume, copied, monkeypatch):
    edit_payload(checkpoints(copied)[0], "versions", torch="2.1.9")
    before = content(copied)
    said = resume("--train.learning_rate", "1e-4", "--train.seed", "7", "--lora.r", "8", "--train.optim", "adamw")
    assert said.code == 2
    lines = said.err.splitlines()
    assert lines[0].endswith("cannot resume with other settings (--allow-change KEY allows one)")
    assert "  train.learning_rate: 0.01 (checkpoint) != 0.0001 (now)" in lines
    assert "  train.seed: 42 (checkpoint) != 7 (now)" in lines
    assert "  lora.r: 4 (checkpoint) != 8 (now); cannot be allowed: the saved adapter has another shape" in lines
    assert f"  versions.torch: '2.1.9' (checkpoint) != '{version('torch')}' (now)" in lines
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        *("lora.r", "train.learning_rate", "train.optim", "train.seed", "trainable_parameters", "versions.torch")
    }
    assert content(copied) == before


def test_an_allowed_change_is_said_recorded_and_holds_from_then_on(resume, copied):
    said = resume("--train.learning_rate", "1e-4", "--allow-change", "train.learning_rate")
    assert said.code == 0, said.err
    assert "allowed: train.learning_rate: 0.01 (checkpoint) != 0.0001 (now)" in said.out.splitlines()
    change = {"step": STOP, "key": "train.learning_rate", "from": 0.01, "to": 0.0001}
    assert json.loads((copied / "changes.json").read_text()) == [change]
    assert tomllib.loads((copied / "config.toml").read_text())["train"]["learning_rate"] == 1e-4
    rates = [record["learning_rate"] for record in metrics(copied) if "loss" in record]
    assert rates[:STOP] == sorted(rates[:STOP], reverse=True) and rates[0] == 1e-2 and max(rates[STOP:]) < 1e-4
    again = resume("--train.learning_rate", "1e-4")
    assert again.code == 0, "the new setting is the run's own now"
    assert json.loads((copied / "changes.json").read_text()) == [change]
    old = resume()
    assert old.code == 2 and "train.learning_rate: 0.0001 (checkpoint) != 0.01 (now)" in old.err


def test_a_change_that_was_lost_again_is_recorded_from_the_step_resumed(resume, copied, tmp_path):
    """The checkpoints after the first change are gone: the run goes on before it, with the changed setting."""
    early = tmp_path / "early"
    shutil.copytree(checkpoints(copied)[1], early)
    assert resume("--train.seed", "7", "--allow-change", "seed").code == 0
    for path in [*checkpoints(copied), copied / "adapter"]:
        shutil.rmtree(path)
    shutil.copytree(early, copied / f"step-{STOP - 1:08d}")
    assert resume("--train.seed", "7").code == 0
    assert [(c["step"], c["key"]) for c in json.loads((copied / "changes.json").read_text())] == [
        (STOP - 1, "train.seed")
    ]


@pytest.mark.parametrize("key", ["train.learning_rat", "train.seed", "nonsense"])
def test_a_key_that_did_not_change_is_an_error_that_says_what_did(resume, copied, key):
    before = content(copied)
    said = resume("--train.learning_rate", "1e-4", "--allow-change", "train.learning_rate", "--allow-change", key)
    assert said.code == 2
    assert f"--allow-change {key}: not changed since the checkpoint; changed: train.learning_rate" in said.err
    assert "changed: nothing" in resume("--allow-change", key).err
    assert content(copied) == before


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [("lora.r", "8", "another shape"), ("lora.target_modules", "q_proj", "other layers"),
     ("train.optim", "adamw", "another kind")],
)  # fmt: skip
def test_what_the_state_does_not_fit_is_refused_though_allowed(resume, flag, value, reason):
    said = resume(f"--{flag}", value, "--allow-change", flag)
    assert said.code == 2 and f"\n  {flag}: " in said.err and reason in said.err


def test_another_method_cannot_be_allowed(space, copied):
    path = space.write("as-dpo", "dpo", data={"eval_source": "holdout", "eval_limit": 4})
    said = run("dpo", path, "--train.output_dir", copied, "--resume", "--allow-change", "method")
    assert said.code == 2
    (line,) = said.err.splitlines()[1:]
    assert line.startswith("  method: 'sft' (checkpoint) != 'dpo' (now); cannot be allowed: ")


def test_another_base_needs_its_name_and_its_content_allowed(space, resume, copied, tmp_path):
    other = Path(shutil.copytree(space.base, tmp_path / "other"))
    said = resume("--model.name", other)
    assert said.code == 2
    assert f"model.name: '{space.base}' (checkpoint) != '{other}' (now)" in said.err
    assert "base.name: 'tiny' (checkpoint) != 'other' (now)" in said.err
    assert resume("--model.name", other, "--allow-change", "model.name").code == 2
    allowed = resume("--model.name", other, "--allow-change", "model.name", "--allow-change", "base")
    assert allowed.code == 0, allowed.err
    assert json.loads((copied / "manifest.json").read_text())["base"]["name"] == "other"


def test_versions_that_numbers_depend_on_are_compared(resume, copied):
    now = verify(checkpoints(copied)[0])["versions"]
    free = {"python": "3.1.0", "numpy": "1.0.0", "lowlevel": "0.0.0"}
    then = {"torch": "2.1.0", "bitsandbytes": "0.1.0", "peft": None, "tokenizers": "0.1", "transformers": "4.0.0",
            "gpu": "Tesla T4", "cuda": "12.8"}  # fmt: skip
    edit_payload(checkpoints(copied)[0], "versions", **free, **then)
    said = resume()
    lines = [f"  versions.{name}: {old!r} (checkpoint) != {now[name]!r} (now)" for name, old in then.items()]
    assert (said.code, sorted(said.err.splitlines()[1:])) == (2, sorted(lines))
    same_minor = ".".join([*now["torch"].split(".")[:2], "99"])
    edit_payload(checkpoints(copied)[0], "versions", torch=same_minor)
    del then["torch"]
    allowed = [word for name in then for word in ("--allow-change", f"versions.{name}")]
    assert resume(*allowed[2:]).code == 2
    said = resume(*allowed, "--train.save_steps", "9")
    assert said.code == 0, said.err


def test_allow_change_needs_a_checkpoint_to_differ_from(space, copied, resume):
    path = space.folder / "stopped.toml"
    said = run("sft", path, "--train.output_dir", copied, "--restart", "--allow-change", "train.seed")
    assert said.code == 2 and "--allow-change needs --resume" in said.err
    for checkpoint in checkpoints(copied):
        shutil.rmtree(checkpoint)
    said = resume("--allow-change", "train.seed")
    assert said.code == 2 and "--allow-change: " in said.err
    said = resume()
    assert said.code == 0 and "no checkpoint yet: starting from step 0" in said.out.splitlines()


def write_rows(space: Workspace, tmp_path: Path, rows: list) -> Path:
    return helpers.write_jsonl(tmp_path / space.sft_rows.name, rows)


def changed(row: dict) -> dict:
    user, assistant = row["messages"]
    return {"messages": [{**user, "content": user["content"] + "!"}, assistant]}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda rows: [*rows[:5], changed(rows[5]), *rows[6:]], "train rows differ: row 5 differs (chats.jsonl:6)"),
        (lambda rows: [*rows[:5], changed(rows[5]), changed(rows[6]), *rows[7:]],
         "train rows differ: row 5 differs (chats.jsonl:6), the first of 2"),
        (lambda rows: [*rows[:4], *rows[5:]],
         "19 train rows now, 20 at the checkpoint; first difference at row 4 (chats.jsonl:5)"),
        (lambda rows: [*rows[:20], changed(rows[0]), *rows[20:]],
         "21 train rows now, 20 at the checkpoint; first difference at row 20 (chats.jsonl:21)"),
        (lambda rows: [*rows[:19], *rows[20:]], "19 train rows now, 20 at the checkpoint; the first 19 are the same"),
        (lambda rows: [*rows[:-1], changed(rows[-1])],
         "evaluation rows differ: row 23 differs (chats.jsonl:24)"),
    ],
)  # fmt: skip
def test_rows_that_changed_are_named(space, resume, copied, tmp_path, monkeypatch, edit, said):
    path = write_rows(space, tmp_path, edit(CHATS))
    saved = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(saved.replace(str(space.sft_rows), str(path)))  # the same file, rewritten
    before = content(copied / checkpoints(copied)[0].name)
    result = resume("--data.source", path)
    assert (result.code, result.err) == (3, f"error: {copied}: cannot resume: {said}\n")
    assert status(copied)["state"] == "failed" and status(copied)["exit"] == 3
    assert status(copied)["checkpoint"] == checkpoints(copied)[0].name
    assert before == content(copied / checkpoints(copied)[0].name)
    key = "evaluation_sha256" if "evaluation" in said else "data_sha256"
    if said.endswith(("(chats.jsonl:6)", "(chats.jsonl:24)")):  # training rows, evaluation rows
        allowed = resume("--data.source", path, "--allow-change", key)
        assert allowed.code == 0, allowed.err
        assert key in (copied / "changes.json").read_text()


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_row_digests_that_are_not_the_checkpoints_are_not_used(space, resume, copied, tmp_path, damage):
    path = write_rows(space, tmp_path, [changed(CHATS[0]), *CHATS[1:]])
    file = copied / "data_rows.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    data[-500] ^= 1
    file.unlink()
    if damage == "other":
        file.write_bytes(data)
    saved = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(saved.replace(str(space.sft_rows), str(path)))
    said = resume("--data.source", path)
    assert said.code == 3 and said.err.endswith("train rows differ from those of the checkpoint\n")


def test_settings_and_rows_that_differ_together_are_one_refusal(space, resume, tmp_path):
    path = write_rows(space, tmp_path, [changed(CHATS[0]), *CHATS[1:]])
    said = resume("--data.source", path)
    assert said.code == 2
    assert f"  data.source: '{space.sft_rows}' (checkpoint) != '{path}' (now)" in said.err
    assert "(now); train rows differ: row 0 differs (chats.jsonl:1)" in said.err
