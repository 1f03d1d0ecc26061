"""A reference cache over plain execution, its shards, and how they are altered without a hash that is wrong."""

from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file

from lowlevel import reference_cache
from lowlevel.batch.layout import Shape
from lowlevel.execution import Eager
from lowlevel.model.adapters import adapter_sha256
from lowlevel.model.base import base_sha256
from lowlevel.reference_cache import CachedReference, reference_identity

SHAPE = Shape(positions=16, examples=4, longest=64, capacity=128)
SPANS = "lowlevel_math"
PAIRS = helpers.ragged_pairs(7)  # not a multiple of SHAPE.examples: some batches hold fillers


def identity_of(policy, parent=None):
    return reference_identity(policy, base_sha256(policy.model), adapter_sha256(parent) if parent else None)


def cached(policy, method, folder, note=pytest.fail, parent=None):
    """A cache over plain execution; by default any line that it prints is a failure."""
    return CachedReference(Eager(policy, method), policy, folder, identity_of(policy, parent), note)


class Recorder:
    """An execution that keeps the batches that it gets."""

    def __init__(self):
        self.batches = []

    def run(self, batch, factor, dropout_key):
        self.batches.append(batch)


def recording(policy, folder, note=pytest.fail):
    recorder = Recorder()
    return CachedReference(recorder, policy, folder, identity_of(policy), note), recorder.batches


def only(paths):
    (path,) = paths
    return path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def alter(shard: Path, change) -> None:
    """Change a shard's entries and describe it anew, so that every hash is right."""
    entries = {key: change(key, value) for key, value in load_file(shard).items()}
    shard.unlink()
    reference_cache.write_shard(shard.parent, {k: v for k, v in entries.items() if v is not None})


def next_float(values):
    """The next larger fp32 numbers."""
    return torch.nextafter(values, torch.full_like(values, torch.inf))
