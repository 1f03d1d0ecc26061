"""Small checkpoints, how they are damaged, and how a process is killed while it writes."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowlevel.checkpoints.checkpoint import save_checkpoint

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json")
PAYLOAD = {
    "state": {"step": 3, "loss": 0.1234567890123456, "rate": 1.5e-05, "none": None},
    "identity": {"method": "sft"},
}


def write_files(folder: Path) -> None:
    save_file({"a": torch.arange(50.0), "b": torch.ones(3)}, folder / "adapter_model.safetensors")
    save_file({"flat::state1": torch.arange(70.0)}, folder / "optimizer.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4, "peft_type": "LORA"}\n')


def save(folder: Path, step: int, keep: int = 9) -> Path:
    folder.mkdir(exist_ok=True)
    return save_checkpoint(folder, step, write_files, PAYLOAD, keep=keep)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


class Killed(BaseException):
    """A kill: nothing of the program runs after it."""


CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def kill_before(patch: pytest.MonkeyPatch, number: int) -> None:
    """Every file operation from the `number`-th on fails as if the process were gone, those of cleaning up too."""
    count = 0

    def counted(original):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return original(*arguments, **keywords)

        return call

    for name in CALLS:
        patch.setattr(os, name, counted(getattr(os, name)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_with(error: BaseException):
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        raise error

    return write
