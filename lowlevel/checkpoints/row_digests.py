"""`data_rows.safetensors` in a run folder: the SHA-256 of each row, so that a resumed run can name a changed row.

train (N, 32) uint8     the rows that became an example, in training order
evaluation (M, 32)      likewise

`data_sha256` and `evaluation_sha256` of a checkpoint are hashes over these; a file that does not match is ignored.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lowlevel.data.prepare import PreparedData
from lowlevel.durable import write_bytes

FILE = "data_rows.safetensors"
SPLITS = {"data_sha256": "train", "evaluation_sha256": "evaluation"}  # key of the identity -> split


def split_digests(data: PreparedData) -> dict[str, tuple[str, ...]]:
    """Hexadecimal digests by split."""
    evaluation = data.report.evaluation
    return {"train": data.report.train.row_digests, "evaluation": evaluation.row_digests if evaluation else ()}


def write_row_digests(run_dir: Path, data: PreparedData) -> None:
    """Write data_rows.safetensors."""
    digests = {split: bytes.fromhex("".join(rows)) for split, rows in split_digests(data).items()}
    arrays = {split: np.frombuffer(rows, np.uint8).reshape(-1, 32) for split, rows in digests.items()}
    write_bytes(run_dir / FILE, save(arrays))


def describe_change(run_dir: Path, key: str, sealed: object, data: PreparedData) -> str:
    """One line that names the changed rows. `sealed`: the checkpoint's value of `key`, a key of SPLITS."""
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
