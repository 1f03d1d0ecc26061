"""Imported once by the fork server: everything that a run imports, so that a trial starts in milliseconds."""

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import lowlevel.cli  # noqa: F401
import lowlevel.running.run  # noqa: F401

# A forked process has none of its parent's threads: there must be no pool that torch would wait for.
torch.set_num_threads(1)
