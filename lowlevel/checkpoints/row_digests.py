"""`data_rows.safetensors` in a run folder: the SHA-256 of each row, so that a resumed run can say which one changed.

train (N, 32) uint8     the rows that gave an example, in training order
evaluation (M, 32)      likewise

A checkpoint's `data_sha256` and `evaluation_sha256` are hashes over these: a file that does not match is not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lowlevel.data.prepare import PreparedData
from lowlevel.durable import write_bytes

FILE = "data_rows.safetensors"
SPLITS = {"data_sha256": "train", "evaluation_sha256": "evaluation"}  # key of the identity -> split


def split_digests(data: PreparedData) -> dict[str, tuple[str, ...]]:
    """Digests in hexadecimal, by split."""
    evaluation = data.report.evaluation
    return {"train": data.report.train.row_digests, "evaluation": evaluation.row_digests if evaluation else ()}


def write_row_digests(run_dir: Path, data: PreparedData) -> None:
    """Write the file."""
    arrays = {split: _to_array(digests) for split, digests in split_digests(data).items()}
    write_bytes(run_dir / FILE, save(arrays))


def describe_change(run_dir: Path, key: str, sealed: object, data: PreparedData) -> str:
    """Which rows changed, in one line.

    Args:
        run_dir: the run folder.
        key: "data_sha256" or "evaluation_sha256".
        sealed: its value at the checkpoint.
        data: the rows now.
    """
    split = SPLITS[key]
    now, then = split_digests(data)[split], _read(run_dir, split)
    if then is None or hashlib.sha256("".join(then).encode()).hexdigest() != sealed:
        return f"{split} rows differ from those of the checkpoint"
    examples = data.train if split == "train" else data.evaluation
    different = [i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b]
    first = different[0] if different else min(len(then), len(now))
    counts = f"{len(now):,} {split} rows now, {len(then):,} at the checkpoint"
    if first == len(now):
        return f"{counts}; the first {first:,} are the same"
    row, where = examples[first].row, examples[first].where
    if len(then) != len(now):
        return f"{counts}; first difference at row {row} ({where})"
    more = f", the first of {len(different):,}" if len(different) > 1 else ""
    return f"{split} rows differ: row {row} differs ({where}){more}"


def _read(run_dir: Path, split: str) -> list[str] | None:
    try:
        return [row.tobytes().hex() for row in load((run_dir / FILE).read_bytes())[split]]
    except (OSError, SafetensorError, KeyError):
        return None


def _to_array(digests: Sequence[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
