"""The adapters that a run starts from: which folder a path stands for, and whether it belongs to this base.

An adapter is a difference to the weights that it was trained on. On another base, or without the frozen adapter that
lay under it, it computes something else, and nothing fails. A PEFT folder inside a run folder is checked against that
run's manifest; of one from elsewhere only the base's name is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowlevel.errors import ConfigError, quoted
from lowlevel.model.adapters import ADAPTER_CONFIG, adapter_sha256
from lowlevel.model.base import resolve_name
from lowlevel.model.files import read_json_object
from lowlevel.running.run_folder import RunFolder

QUANTISATION = ("dtype", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def find_adapter(path: str | None, key: str) -> Path | None:
    """The PEFT folder that a run folder or PEFT folder stands for; `key` is the setting, for errors.

    Raises:
        ConfigError: nothing there, or an unfinished run.
    """
    if path is None:
        return None
    folder = RunFolder(Path(path))
    if (folder.path / ADAPTER_CONFIG).exists():
        return folder.path
    if not folder.path.exists():
        raise ConfigError(f"{key}: {path} does not exist")
    if not folder.adapter.exists():
        raise ConfigError(f"{key}: {path} holds no adapter; has that run finished?")
    return folder.adapter


def check_frozen_under(parent: Path | None, init_from: Path | None) -> None:
    """Refuse an adapter that was trained on a frozen one and would do without it here.

    Args:
        parent: the adapter that stays frozen.
        init_from: the adapter that is trained on; a frozen one under it must be `parent`.

    Raises:
        ConfigError: with what to do.
        CheckpointError: a manifest that cannot be read.
    """
    if parent and _frozen_under(parent):
        raise ConfigError(
            f"model.adapter: {parent} stands on an adapter of its own; merge it first (lowlevel merge) and start from "
            "that"
        )
    under = _frozen_under(init_from) if init_from else None
    if under and (parent is None or adapter_sha256(parent) != under):
        raise ConfigError(
            f"lora.init_from: {init_from} stands on an adapter of its own: set model.adapter to that one, or merge "
            "both first (lowlevel merge) and start from that"
        )


def check_bases(folders: Mapping[str, Path | None], base: Mapping[str, Any]) -> list[str]:
    """Whether adapters were trained on this base.

    Args:
        folders: PEFT folders by the setting that names them.
        base: the run's, as its manifest has it (`lowlevel.running.assembly.identity`).

    Returns:
        A line for each that cannot be told by hash and has a base of another name.

    Raises:
        ConfigError: other weights in the same dtype and quantisation.
        CheckpointError: a manifest or adapter_config.json that cannot be read.
    """
    notes = []
    for key, folder in folders.items():
        if folder is None:
            continue
        then = _manifest(folder).get("base", {})
        if then.get("sha256") and all(then.get(k) == base.get(k) for k in QUANTISATION):
            if then["sha256"] != base.get("sha256", then["sha256"]):
                raise ConfigError(
                    f"{key}: {folder} was trained on the base {quoted(then['name'])} ({then['sha256'][:12]}), and this "
                    f"one is {quoted(base['name'])} ({base['sha256'][:12]}): set model.name to that base; to use it "
                    "all the same, copy that folder out of its run"
                )
            continue
        name = then.get("name") or read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if name and Path(resolve_name(name)).name != Path(resolve_name(base["name"])).name:
            notes.append(f"{key}: {folder} names {quoted(str(name))} as its base, and this run's is {base['name']}")
    return notes


def _frozen_under(folder: Path) -> str | None:
    """SHA-256 of the frozen adapter that an adapter in a run folder was trained on."""
    run = RunFolder(folder.resolve().parent)
    inside = folder.resolve() not in (run.parent, run.stacked)
    return _manifest(folder).get("parent_adapter") if inside else None


def _manifest(folder: Path) -> dict[str, Any]:
    """Of the run that an adapter's folder lies in; empty where it lies in none. Others have a manifest.json, too."""
    run = RunFolder(folder.resolve().parent)
    manifest = run.read_manifest() if (run.path / "manifest.json").exists() else {}
    return manifest if isinstance(manifest.get("base"), dict) and "parent_adapter" in manifest else {}
