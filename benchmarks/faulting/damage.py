"""Damage to the files of a checkpoint, as disks, copies and people do it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

PAGE = 4096


def flip(file: Path, rng: random.Random) -> str:
    """One bit."""
    data = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return f"bit {bit}"


def truncate(file: Path, rng: random.Random) -> str:
    """Cut at any length, 0 too."""
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"to {size} bytes"


def zero_page(file: Path, rng: random.Random) -> str:
    """A page of zeros where something was."""
    data = bytearray(file.read_bytes())
    pages = [start for start in range(0, len(data), PAGE) if any(data[start : start + PAGE])]
    start = rng.choice(pages)
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    file.write_bytes(data)
    return f"at {start}"


def all_zero(file: Path, rng: random.Random) -> str:
    """The right size, and nothing in it: what some file systems leave after a power cut."""
    file.write_bytes(bytes(file.stat().st_size))
    return ""


def append(file: Path, rng: random.Random) -> str:
    """Bytes at the end."""
    extra = rng.randbytes(rng.choice((1, 7, PAGE)))
    with open(file, "ab") as end:
        end.write(extra)
    return f"{len(extra)} bytes"


def delete(file: Path, rng: random.Random) -> str:
    """Gone."""
    file.unlink()
    return ""


def swap_within(file: Path, rng: random.Random) -> str:
    """Changed places with another file of the same checkpoint."""
    other = rng.choice(sorted(path for path in file.parent.iterdir() if path != file))
    _swap(file, other)
    return f"with {other.name}"


def swap_between(file: Path, rng: random.Random) -> str:
    """Changed places with the same file of the checkpoint before it: two checkpoints are damaged."""
    before = sorted(path for path in file.parent.parent.glob("step-*") if path.name < file.parent.name)[-1]
    _swap(file, before / file.name)
    return f"with that of {before.name}"


def older_content(file: Path, rng: random.Random) -> str:
    """A copy of the same file of the checkpoint before it."""
    before = sorted(path for path in file.parent.parent.glob("step-*") if path.name < file.parent.name)[-1]
    shutil.copyfile(before / file.name, file)
    return f"of {before.name}"


def link(file: Path, rng: random.Random) -> str:
    """A symbolic link to the same content elsewhere."""
    elsewhere = file.parent.parent.parent / f"elsewhere-{file.name}"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    return ""


def dangling_link(file: Path, rng: random.Random) -> str:
    """A symbolic link to nothing."""
    file.unlink()
    file.symlink_to("/nowhere/at-all")
    return ""


def directory(file: Path, rng: random.Random) -> str:
    """A folder of the file's name."""
    file.unlink()
    file.mkdir()
    return ""


def extra_file(file: Path, rng: random.Random) -> str:
    """Another file beside it."""
    shutil.copyfile(file, file.with_name(f"copy-of-{file.name}"))
    return ""


def empty_folder(file: Path, rng: random.Random) -> str:
    """The whole checkpoint lost its files."""
    for path in file.parent.iterdir():
        path.unlink()
    return ""


def folder_is_a_file(file: Path, rng: random.Random) -> str:
    """A file has the checkpoint's name."""
    shutil.rmtree(file.parent)
    file.parent.write_bytes(rng.randbytes(100))
    return ""


def folder_is_a_link(file: Path, rng: random.Random) -> str:
    """The checkpoint's name is a link to an empty folder."""
    target = file.parent.parent.parent / "elsewhere"
    target.mkdir()
    shutil.rmtree(file.parent)
    file.parent.symlink_to(target)
    return ""


def _swap(one: Path, other: Path) -> None:
    spare = one.parent.parent.parent / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    flip, truncate, zero_page, all_zero, append, delete, swap_within, swap_between, older_content, link, dangling_link,
    directory, extra_file, empty_folder, folder_is_a_file, folder_is_a_link,
)  # fmt: skip
FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "manifest.json")


def damage(checkpoint: Path, number: int, rng: random.Random) -> str:
    """Do damage `number` to a checkpoint and say what: kinds and files come in turns, places at random."""
    kind = DAMAGES[number % len(DAMAGES)]
    name = FILES[number // len(DAMAGES) % len(FILES)]
    return f"{kind.__name__} {name} {kind(checkpoint / name, rng)}".strip()
