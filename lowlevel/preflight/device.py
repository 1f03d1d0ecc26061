"""The device and how a run would use it (precision, attention, execution, compiler), and the folders of runs and of hub
models. Nothing here uses the network.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor

from lowlevel.config.schema import ModelConfig
from lowlevel.determinism import compiler_options
from lowlevel.durable import write_json
from lowlevel.errors import ConfigError, one_line
from lowlevel.model.attention_choice import choose_attention
from lowlevel.model.base import load_model_config
from lowlevel.model.layers import COMPILER
from lowlevel.model.placement import choose_placement
from lowlevel.preflight.finding import Finding, fail, note, ok
from lowlevel.preflight.numerics import demo_config
from lowlevel.running.assembly import check_inputs, choose_execution
from lowlevel.running.run_folder import run_lock

GIB = 2**30
FREE_SHARE = 0.8  # of a GPU's memory: this process's own CUDA context takes less than the rest
OLDEST_DRIVER = {"12": 525, "13": 580}  # that runs a CUDA of this major version
TRIAL_BOUND = 1e-5  # between an fp32 function and the same one compiled
MODES = {
    "graphed": "graphed: layers compiled, each batch shape captured in a CUDA graph",
    "compiled": "compiled: each decoder layer compiled",
    "eager": "eager: every operation launched from Python",
}


def device() -> Finding:
    """The GPU that a run would use, tried with one addition; or the CPU, and why no GPU is visible."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        visible = torch.cuda.is_available()
    if not visible:
        return _cpu([str(one.message) for one in caught])
    index = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    count = torch.cuda.device_count()
    found = (
        f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {free / GIB:.1f} of "
        f"{total / GIB:.1f} GiB free; CUDA {torch.version.cuda}"
    )
    if count > 1:
        found += f"; {count} GPUs visible, one is used: cuda:{index} (CUDA_VISIBLE_DEVICES chooses another)"
        idle = f"train on all: add --gpus {count}"
    if not _adds_right():
        return fail(f"{found}; 8 x (1 + 1) is not 16 there", "restart the machine, or take another")
    if free < FREE_SHARE * total:
        found += f"; others hold {(total - free) / GIB:.1f} GiB"
        return note(found, "stop them (nvidia-smi), or plan for less memory")
    return note(found, idle) if count > 1 else ok(found)


def _adds_right() -> bool:
    """Run one kernel on the GPU. Raises torch's error if this torch has no kernel for it."""
    return float((torch.ones(8, device="cuda") + 1).sum()) == 16


def _cpu(warned: list[str]) -> Finding:
    found = f"CPU, threads: {torch.get_num_threads()}; no GPU is visible"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if warned:
        reason = warned[0].strip().splitlines()[0]
        cuda = torch.version.cuda or "12"  # what pip installs by default may be newer than the machine's driver
        needed = f"CUDA {cuda} of this torch needs driver {OLDEST_DRIVER.get(cuda.split('.')[0], 580)} or newer"
        mend = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
        return note(f"{found}: {reason}", f"{needed}; for an older one: {mend}")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return note(f"{found}: CUDA_VISIBLE_DEVICES is {hidden!r}", "unset it to use the GPU")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        found += f": nvidia-smi is here, but torch {torch.__version__} is built without CUDA"
        return note(found, "install a torch with CUDA (pytorch.org)")
    return note(found, "small models train on a CPU; in a notebook, choose a GPU runtime (T4)")


def precision() -> Finding:
    """The precision of train.precision = "auto", and whether bf16 is possible."""
    automatic = choose_placement("auto").precision
    try:
        choose_placement("bf16")
        bf16 = "bf16 is possible"
    except ConfigError as error:
        bf16 = str(error)
    return ok(f'{automatic} (train.precision = "auto"); {bf16}')


def attention() -> Finding:
    """The kernel that a run of the built-in base would use, and why."""
    config, placement = ModelConfig(), choose_placement("auto")
    chosen = choose_attention(config, load_model_config(config), placement)
    if placement.device.type == "cuda" and chosen.kernel is None:
        return note(chosen.reason, "packed rows need a mask, and steps cannot be captured as graphs")
    return ok(chosen.reason)


def execution() -> Finding:
    """The execution of a step."""
    config = demo_config("sft")
    return ok(f'{MODES[choose_execution(config, check_inputs(config))]} (train.execution = "auto")')


def compiler() -> Finding:
    """Compile and run a tiny function on the device, with the compiler settings of layers."""
    place = choose_placement("auto").device
    x = torch.linspace(-1, 1, 64, device=place)
    began = time.perf_counter()
    try:
        found = torch.compile(_tiny, fullgraph=True, options={**COMPILER, **compiler_options()})(x)
        apart = float((found - _tiny(x)).abs().max())
    except Exception as error:  # from torch, Triton, or a missing gcc
        lost = "runs on a CPU are eager anyway" if place.type == "cpu" else "runs fall back to eager, which is slower"
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        return note(f"does not work: {reason}", f"{lost}; usually gcc or python3-dev is missing")
    if not apart <= TRIAL_BOUND:
        return fail(f"a compiled function is off by {apart:.1e}", 'set train.execution = "eager"')
    return ok(f"compiled and ran a function on {place.type} in {time.perf_counter() - began:.1f} s")


def _tiny(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * 2 + 1


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
