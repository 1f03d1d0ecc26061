"""The machine of a run: environment.json, versions for its checkpoints, and its placement on the machine here."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from lowlevel.batch.order import ORDER_VERSION
from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.model.files import read_or_empty
from lowlevel.model.placement import DTYPES, Placement, choose_placement, dtype_name
from lowlevel.running.run_folder import RunFolder
from lowlevel.version import __version__

ENVIRONMENT = "environment.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "numpy")


def environment(placement: Placement, ranks: int) -> dict[str, Any]:
    """Versions and machine, for environment.json; no paths, names or variables of the user."""
    found = versions(placement)
    cuda, gpu = found.pop("cuda"), found.pop("gpu")
    device: dict[str, Any] = {"device": gpu or "cpu", "threads": torch.get_num_threads()}
    device |= {"precision": placement.precision}
    if gpu:
        device |= {"compute_capability": ".".join(map(str, torch.cuda.get_device_capability())), "cuda": cuda}
    device |= {"ranks": ranks} if ranks > 1 else {}
    system = f"{platform.system()} {platform.machine()}"
    return {**found, "system": system, "order_version": ORDER_VERSION, **device}


def versions(placement: Placement) -> dict[str, str | None]:
    """Versions of lowlevel, Python and the libraries that compute; "cuda" and "gpu" are None on a CPU."""
    on_gpu = placement.device.type == "cuda"
    cuda, gpu = (torch.version.cuda, torch.cuda.get_device_name()) if on_gpu else (None, None)
    libraries = {name: version(name) for name in LIBRARIES}
    return {"lowlevel": __version__, "python": platform.python_version(), **libraries, "cuda": cuda, "gpu": gpu}


def placement_here(folder: RunFolder, config: RunConfig, dtype: str) -> tuple[Placement, str | None, bool | None]:
    """Placement, `moved` and `elsewhere` of `Reopened`. If the run's device is unknown, its base must be the same."""
    was = _environment(folder, dtype)
    device, precision, threads, ranks = was or ("a device that environment.json does not name", None, None, 1)
    try:
        placement = choose_placement(precision if precision in DTYPES else config.train.precision)
    except ConfigError:
        placement = choose_placement("auto")
    on_gpu, own_threads = placement.device.type == "cuda", torch.get_num_threads()
    here = torch.cuda.get_device_name() if on_gpu else "cpu"
    if (device, precision) != (here, placement.precision):
        moved = f"the run computed in {precision} on {device}, this is {placement.precision} on {here}"
        return placement, moved, device != here if was else None
    if ranks > 1:
        return placement, f"the run added on {ranks} GPUs, in another order", False
    if on_gpu and not (config.train.deterministic or torch.are_deterministic_algorithms_enabled()):
        return placement, "a GPU sums in varying order, unless the run has train.deterministic = true", False
    if not on_gpu and threads not in (None, own_threads):
        return placement, f"the run computed with {threads} threads, this is {own_threads}", True
    return placement, None, False


def _environment(folder: RunFolder, dtype: str) -> tuple[str, str, int | None, int] | None:
    """Device, precision, threads and number of GPUs (or processes) of the run; None if they cannot be read or do not
    fit the manifest's `dtype`.
    """
    was = read_or_empty(folder.path / ENVIRONMENT)
    device, precision, threads, ranks = was.get("device"), was.get("precision"), was.get("threads"), was.get("ranks", 1)
    if not (isinstance(device, str) and isinstance(precision, str) and isinstance(threads, int | None)):
        return None
    fits = precision not in DTYPES or dtype_name(DTYPES[precision]) == dtype
    return (device, precision, threads, ranks) if fits and isinstance(ranks, int) else None
