"""Imported once by the fork server: everything that a run imports, so that a trial starts in milliseconds."""

from pathlib import Path

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from matplotlib.figure import Figure

import lowlevel.cli  # noqa: F401
import lowlevel.running.training  # noqa: F401

# A forked process has none of its parent's threads: there must be no pool that torch would wait for.
torch.set_num_threads(1)
# Nor is loss.png drawn, which takes a fifth of a trial: an empty file is written in its place.
setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b""))  # noqa: B010
