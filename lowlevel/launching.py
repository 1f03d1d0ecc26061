"""The processes of a run on several GPUs: torchrun starts them, and the first of them speaks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import torch

from lowlevel.errors import ConfigError


def is_first() -> bool:
    """Whether this process is the first of torchrun's, or alone."""
    return os.environ.get("RANK", "0") == "0"


def launch(arguments: Sequence[str], gpus: int) -> int:
    """Run `lowlevel ARGUMENTS` in `gpus` processes under torchrun; the exit code of the first that failed.

    Raises ConfigError if there are GPUs, but fewer.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    visible = torch.cuda.device_count()
    if 0 < visible < gpus:
        raise ConfigError(f"--gpus {gpus}: {visible} visible here")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    config = LaunchConfig(
        1,
        1,
        gpus,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="localhost",
    )
    logging.disable(logging.ERROR)  # of torchrun: the ranks say what happens
    try:
        elastic_launch(config, sys.executable)("-m", "lowlevel", *arguments)
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        return code if code > 0 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
