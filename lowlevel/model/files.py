"""Checks of foreign files before a library opens them: pickles, paths outside the folder, oversized JSON.

Only local folders are checked; downloads from the hub are read with `use_safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowlevel.errors import CheckpointError, how_many, one_line, quoted

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 64
MAX_POINTER_BYTES = 1024
SHOWN = 5
FLOATS = ("F16", "BF16", "F32", "F64")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MiB and 64 levels. Raises CheckpointError, or FileNotFoundError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_JSON_BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: nested too deeply") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} cannot be read: not a JSON object")
    if _deeper(value, MAX_JSON_DEPTH):
        raise CheckpointError(f"{path} cannot be read: nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def read_or_empty(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is missing (older versions wrote fewer files) or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def folders_with(file: str, folder: Path) -> list[Path]:
    """Subfolders that hold a file, shortest names first: those of the folder; without one, those one level below."""
    for level in ("*", "*/*"):
        if found := [path.parent for path in folder.glob(f"{level}/{file}")]:
            return sorted(found, key=lambda path: (len(path.name), path.name))
    return []


def refuse_pickles(folder: Path, what: str) -> None:
    """Raise CheckpointError if a folder's weights are pickles, which run code; next to safetensors they may stay."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(f"{what}: {folder / pickles[0]} is a pickle; convert the weights to safetensors first")


def refuse_pointers(folder: Path) -> None:
    """Raise CheckpointError if Git has left pointers in a folder instead of the files themselves."""
    for file in sorted(file for suffix in ("json", "safetensors") for file in folder.glob(f"*.{suffix}")):
        if file.stat().st_size < MAX_POINTER_BYTES and file.read_bytes().startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself: git lfs pull in its folder")


def refuse_no_weights(folder: Path) -> None:
    """Raise CheckpointError if a local folder has no weights under the names that transformers reads."""
    if not folder.is_dir() or _shards(folder):
        return
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf", ".pth"))
    raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}; found: {_first(found) or 'no weights'}")


def weight_names(folder: Path) -> list[str]:
    """Names of the tensors in a local model's shards, from their headers; none for a hub name."""
    names: list[str] = []
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                names += file.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is damaged or cut: {one_line(error)}") from None
    return names


def check_weight_files(folder: Path, *, quantised: bool = False) -> None:
    """Check a local model's shards: in the folder, complete, finite, and floats unless the model is quantised.

    Raises CheckpointError before quantisation, which can hide a NaN: the largest value of a block may ignore it.
    """
    # Bytes of 4-bit weights in a floating dtype (bnb_4bit_quant_storage), which mean nothing as numbers:
    packed = {n.removesuffix(".absmax") for n in (weight_names(folder) if quantised else ()) if n.endswith(".absmax")}
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
                floats = sorted(name for name, kind in kinds.items() if kind in FLOATS and name not in packed)
                bad = [name for name in floats if not is_finite(file.get_tensor(name))]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is damaged or cut: {one_line(error)}") from None
        wrong = [f"{name} ({kind})" for name, kind in sorted(kinds.items()) if kind not in FLOATS]
        if wrong and not quantised:
            raise CheckpointError(f"{shard}: {how_many(len(wrong), 'tensors')} not floating-point: {_first(wrong)}")
        if bad:
            raise CheckpointError(f"{shard}: {how_many(len(bad), 'tensors')} not finite: {_first(bad)}")


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, for any floating dtype. Needs no buffer, unlike torch.isfinite."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _shards(folder: Path) -> list[Path]:
    """The weight files that transformers would read: model.safetensors, or those of the index."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of file names")
    names = sorted(set(weight_map.values()))
    strange = [quoted(repr(n)) for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if strange:
        raise CheckpointError(f"{index} names {_first(strange)}: shards are plain names ending in .safetensors")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards missing: {_first(missing)}")
    return [folder / name for name in names]


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN])
