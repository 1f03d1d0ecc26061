"""The folders of runs and of hub models. Nothing here uses the network."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import constants

from lowlevel.durable import write_json
from lowlevel.preflight.finding import Finding, fail, note, ok
from lowlevel.running.run_folder import run_lock

GIB = 2**30
LITTLE_ROOM = 2 * GIB  # three checkpoints of the recipe, two kept and one being written, take 1.7 GiB


def run_folder(out: Path) -> Finding:
    """Lock, write, sync and rename below `out`, as a run does, or below its nearest existing parent."""
    place = _existing(out)
    if out.exists() and not out.is_dir():
        return fail(f"{out} is a file", "runs need a folder: give another --out, and another train.output_dir")
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=place) as trial, run_lock(Path(trial) / "step"):
            write_json(Path(trial) / "step" / "file.json", {})
            os.rename(Path(trial) / "step", Path(trial) / "step-00000001")
    except OSError as error:
        advice = "set train.output_dir to a folder on a disk that can be written"
        return fail(f"{place.resolve()}: {error.strerror}", advice)
    free = shutil.disk_usage(place).free
    found = f"{place.resolve()} can be written and synced, {free / GIB:,.1f} GiB free"
    if free < LITTLE_ROOM:
        return note(found, "three checkpoints of the recipe take 1.7 GiB: free some room, or save less often")
    return ok(found)


def hub() -> Finding:
    """The hub's cache folder, its models, and whether downloads can be written."""
    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*")))
    found = f"{cache}, {models} models in it, offline mode {'on' if constants.HF_HUB_OFFLINE else 'off'}"
    if constants.HF_HUB_OFFLINE:
        if models:
            return ok(found)
        return note(found, "only local models, local data and the built-in ones can be used; or unset HF_HUB_OFFLINE")
    place = _existing(cache)
    if not os.access(place, os.W_OK):
        return note(f"{found}; {place} cannot be written", "set HF_HOME to a folder that can, for models of the hub")
    return ok(f"{found}, {shutil.disk_usage(place).free / GIB:,.1f} GiB free")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())
