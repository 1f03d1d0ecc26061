"""Rows, run files and the command line in this process, for tests of whole runs."""

import io
import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import helpers
import tomli_w
from safetensors.torch import load_file, save_file

from lowlevel.cli import main
from lowlevel.data.tokenizer import load_chat_tokenizer
from lowlevel.running.observer import RunObserver

if TYPE_CHECKING:
    import pytest

HELD_OUT = 6
PROMPTS = [f"{'please ' * (i % 3)}write {i} backwards" for i in range(24)]
CHATS = [
    {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": f"{p[::-1]}!"[: 5 + i % 9]}]}
    for i, p in enumerate(PROMPTS)
]
PAIRS = [{"prompt": p, "chosen": p[::-1][: 4 + i % 7], "rejected": "no " * (1 + i % 4)} for i, p in enumerate(PROMPTS)]


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> Said:
    """`lowlevel ARGUMENTS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
    return Said(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Workspace:
    """Where the runs of these tests lie."""

    folder: Path
    base: Path
    sft_rows: Path
    dpo_rows: Path

    def write(self, name: str, method: str, *, folder: Path | None = None, **sections: dict) -> Path:
        """A run file, whose run folder is `name` beside it; `sections` go over what is here."""
        folder = folder or self.folder
        rows, kind = (self.sft_rows, "messages") if method == "sft" else (self.dpo_rows, "preference")
        data = {"source": str(rows), "format": kind, "max_length": 128}
        tables = {
            "method": method,
            "model": {"name": str(self.base)},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "data": data,
            "train": {
                "output_dir": str(folder / name),
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "max_steps": 6,
            },
        }
        for section, values in sections.items():
            tables[section] = {**tables.get(section, {}), **values}
            tables[section] = {key: value for key, value in tables[section].items() if value is not None}
        path = folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(tables), encoding="utf-8")
        return path

    def copy(self, name: str, to: Path) -> Path:
        """A copy of a run folder, to be damaged."""
        return Path(shutil.copytree(self.folder / name, to / name))


@dataclass(frozen=True)
class Runs:
    """The two runs: their folders and what was printed."""

    space: Workspace
    sft: Path
    dpo: Path
    said: dict[str, Said]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def make_workspace(folder: Path) -> Workspace:
    """A tiny base, chats and pairs, in a new folder."""
    helpers.write_tiny_base(folder / "tiny")
    sft_rows = helpers.write_jsonl(folder / "chats.jsonl", CHATS)
    return Workspace(folder, folder / "tiny", sft_rows, helpers.write_jsonl(folder / "pairs.jsonl", PAIRS))


def reply(cli, folder: Path, *options: object) -> str:
    """What `lowlevel generate` says to one prompt."""
    said = cli("generate", folder, "--prompt", PROMPTS[1], "--max-new-tokens", 16, *options)
    assert said.code == 0, said.err
    return said.out


def alter_adapter(folder: Path) -> None:
    """One adapter weight changed, the file otherwise well-formed."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def at_step(patch: "pytest.MonkeyPatch", step: int, do) -> None:
    """Call `do` at the end of a step of the runs to come, counted from 1."""
    original = RunObserver.progress

    def progress(self, state, result):
        original(self, state, result)
        if state.step == step:
            do()

    patch.setattr(RunObserver, "progress", progress)


def stop_at(patch: "pytest.MonkeyPatch", step: int) -> None:
    """SIGTERM at the end of a step of the runs to come."""
    at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def status(folder: Path) -> dict:
    return json.loads((folder / "run-status.json").read_text())


def without(folder: Path, *unlike: str) -> list[dict]:
    """The metrics of a run but for those that no two runs share."""
    return [{name: value for name, value in line.items() if name not in unlike} for line in metrics(folder)]


def break_letter(base: Path) -> None:
    """A NaN in the embedding of the letter Q."""
    letter = load_chat_tokenizer(str(base), None, None).tokenizer.encode("Q", add_special_tokens=False)[0]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][letter, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def let_nan_through(patch: "pytest.MonkeyPatch") -> None:
    """Bases with a NaN are refused; not these."""
    for module in ("lowlevel.model.files", "lowlevel.model.base_checks"):
        patch.setattr(f"{module}.is_finite", lambda tensor: True)
    patch.setattr("lowlevel.model.build.check_base", lambda policy: None)  # its tokens may hold the letter
