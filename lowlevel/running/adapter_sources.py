"""The adapters that a run starts from: finding their folders, and checking that they belong to this base.

An adapter is a difference to the weights that it was trained on. On another base, or without its frozen adapter, it
gives wrong results without an error. A PEFT folder inside a run folder is compared with that run's manifest; for other
folders only the base's name is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError, quoted
from lowlevel.model.adapters import ADAPTER_CONFIG, adapter_sha256
from lowlevel.model.base import resolve_name
from lowlevel.model.files import SHOWN, folders_with, read_json_object
from lowlevel.model.quantisation import KEYS
from lowlevel.running.run_folder import RunFolder

QUANTISATION = ("dtype", *KEYS)


def find_adapter(path: str | None, key: str) -> Path | None:
    """The PEFT folder at `path`: itself, the final adapter of that run, or the only one in it.

    Raises ConfigError: none or several; names `key`, and what the folder holds instead.
    """
    if path is None:
        return None
    folder = RunFolder(Path(path))
    if (folder.path / ADAPTER_CONFIG).exists():
        return folder.path
    if folder.path.is_file():
        raise ConfigError(f"{key}: {path} is a file; give the folder that holds {ADAPTER_CONFIG}")
    if not folder.path.exists():
        hub = f"; to use one of the hub: hf download {path} --local-dir DIR" if path.count("/") == 1 else ""
        raise ConfigError(f"{key}: {path} does not exist{hub}")
    if folder.whole.exists():
        raise ConfigError(f"{key}: {path} trained all weights: set model.name to {folder.whole} instead")
    if folder.adapter.exists():
        return folder.adapter
    inside = folders_with(ADAPTER_CONFIG, folder.path)
    if len(inside) == 1 and not folder.holds_run():
        return inside[0]
    raise ConfigError(f"{key}: {path} holds no adapter; {_instead(folder, inside)}")


def _instead(folder: RunFolder, inside: list[Path]) -> str:
    names = ", ".join(str(path.relative_to(folder.path)) for path in inside[-SHOWN:])
    if folder.holds_run():
        return f"has that run finished?{f' Its checkpoints can be given: {names}' if inside else ''}"
    if inside:
        return f"these in it do, give the path of one: {names}"
    if (folder.path / "config.json").exists():
        return "it holds a whole model: set model.name to it"
    return f"no {ADAPTER_CONFIG} is in it"


def notes_of_sources(config: RunConfig, folders: Mapping[str, Path | None]) -> list[str]:
    """A line for each adapter that `find_adapter` took from a subfolder. `folders`: as for `check_bases`."""
    given = {"model.adapter": config.model.adapter, "lora.init_from": config.lora.init_from}
    return [
        f"{key}: {given[key]} holds one adapter, {folder.relative_to(given[key] or '')}: it is used"
        for key, folder in folders.items()
        if folder and folder not in (path := Path(given[key] or ""), RunFolder(path).adapter)
    ]


def check_frozen_under(parent: Path | None, init_from: Path | None) -> None:
    """Refuse an adapter whose own frozen adapter is missing here. Raises ConfigError, CheckpointError.

    `parent`, which stays frozen, must have been trained without one; that of `init_from`, if any, must be `parent`.
    """
    if parent and _frozen_under(parent):
        run = RunFolder(parent.parent)
        mend = "merge both first (lowlevel merge) and start from the merged model"
        mend = f"give {run.stacked}, which is both" if parent == run.adapter and run.stacked.exists() else mend
        raise ConfigError(f"model.adapter: {parent} was trained on a frozen adapter: {mend}")
    under = _frozen_under(init_from) if init_from else None
    if under and (parent is None or adapter_sha256(parent) != under):
        raise ConfigError(
            f"lora.init_from: {init_from} was trained on a frozen adapter: set model.adapter to that one, or merge "
            "both first (lowlevel merge) and start from the merged model"
        )


def check_bases(folders: Mapping[str, Path | None], base: Mapping[str, Any]) -> list[str]:
    """Check that adapters were trained on this base.

    Args:
        folders: PEFT folders by the setting that names them.
        base: the run's, as in its manifest (`lowlevel.running.assembly.identity`).

    Returns:
        A line for each adapter whose base has another name and no comparable hash.

    Raises:
        ConfigError: same dtype and quantisation, but another hash.
        CheckpointError: a manifest or adapter_config.json cannot be read.
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
                    f"one is {quoted(base['name'])} ({base['sha256'][:12]}): set model.name to that base; to use the "
                    "adapter anyway, copy its folder out of the run folder"
                )
            continue
        name = then.get("name") or read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if name and Path(resolve_name(name)).name != Path(resolve_name(base["name"])).name:
            notes.append(f"{key}: {folder} names {quoted(str(name))} as its base, and this run's is {base['name']}")
    return notes


def notes_of_templates(folders: Mapping[str, Path | None], sha256: str) -> list[str]:
    """A line for each adapter whose run had another chat template than this one, with the hash `sha256`."""
    then = {key: _manifest(folder).get("chat_template_sha256") for key, folder in folders.items() if folder}
    hint = "another chat template: it has not learned this one's tokens (data.chat_template_from)"
    return [f"{key}: {folders[key]} was trained with {hint}" for key, old in then.items() if old not in (None, sha256)]


def _frozen_under(folder: Path) -> str | None:
    """SHA-256 of the frozen adapter on which an adapter in a run folder was trained; None without one."""
    run = RunFolder(folder.resolve().parent)
    inside = folder.resolve() not in (run.parent, run.stacked)
    return _manifest(folder).get("parent_adapter") if inside else None


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run folder around an adapter; empty without one, or for another kind of manifest.json."""
    run = RunFolder(folder.resolve().parent)
    manifest = run.read_manifest() if (run.path / "manifest.json").exists() else {}
    return manifest if isinstance(manifest.get("base"), dict) and "parent_adapter" in manifest else {}
