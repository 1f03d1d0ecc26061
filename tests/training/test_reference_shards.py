"""Shards of the reference cache on disk: damaged ones are ignored, whole ones add up, a full disk costs one line."""

import errno
import hashlib
import math
import os

import helpers
import pytest
import torch
from reference_caching import PAIRS, alter, cached, only, recording, shards
from safetensors.torch import load_file, save

from lowlevel import reference_cache
from lowlevel.hashing import key32


def flip(shard):
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)


def other_numbers(shard):
    entries = {key: value.double() for key, value in load_file(shard).items()}
    rewrite(shard, save(entries))


def rewrite(shard, data):
    """Another content, under its hash."""
    shard.unlink()
    shard.with_name(f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)


DAMAGE = {
    "a flipped bit": (flip, "its content does not match"),
    "cut short": (lambda shard: shard.write_bytes(shard.read_bytes()[:-8]), "its content does not match"),
    "another name": (lambda shard: shard.rename(shard.with_stem("0" * 64)), "its content does not match its name"),
    "a folder": (lambda shard: (shard.unlink(), shard.mkdir()), "cannot be read: IsADirectoryError"),
    "no safetensors": (lambda shard: rewrite(shard, b"x" * 40), "cannot be read: SafetensorError"),
    "another dtype": (other_numbers, "is not a vector of finite fp32 numbers"),
    "not finite": (lambda shard: alter(shard, lambda key, value: value / 0.0), "a vector of finite fp32 numbers"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_ignored_with_one_line(filled, damage):
    policy, method, folder = filled
    live = helpers.loss_and_gradient(policy, method, PAIRS)
    hurt, message = DAMAGE[damage]
    hurt(only(shards(folder)))
    notes = []
    cache = cached(policy, method, folder, notes.append)
    found = helpers.loss_and_gradient(policy, method, PAIRS, execution=cache)
    assert found[0] == live[0] and torch.equal(found[1], live[1])
    assert len(notes) == 1 and notes[0].startswith(f"reference cache: ignored {folder}") and message in notes[0]
    assert (cache.hits, cache.computed) == (0, len(method.micro_batches(PAIRS)))


def test_a_shard_is_written_whole_under_its_hash_and_partial_files_go(filled):
    policy, method, folder = filled
    shard = only(shards(folder))
    before = shard.read_bytes()
    shard.unlink()
    (shard.parent / f".tmp-{shard.name}-1").write_bytes(b"half")  # as a crash leaves it
    cache, _ = recording(policy, folder)
    for batch in method.micro_batches(PAIRS):
        cache.run(batch, 1.0, key32(1, 0))
    cache.flush()
    assert cache.hits == 0 and not list(shard.parent.glob(".tmp-*"))
    assert only(shards(folder)) == shard and shard.read_bytes() == before, "the same entries have the same name"
    shard.with_suffix(".json").write_text("{}")  # older versions wrote one beside it
    assert recording(policy, folder)[0]._cache().from_disk


def test_processes_share_a_folder_and_shards_add_up(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "ENTRIES_PER_SHARD", 3)
    policy, method = helpers.make_policy(tiny_base), helpers.dpo(1)
    first, second = (recording(policy, tmp_path)[0] for _ in range(2))  # neither sees what the other writes
    batches = method.micro_batches(PAIRS)
    for cache, part in ((first, batches[:4]), (second, batches[3:])):
        for batch in part:
            cache.run(batch, 1.0, key32(1, 0))
        assert cache.computed == 4
    assert len(shards(tmp_path)) == 2, "three entries each; the fourth is not yet written"
    first.flush()
    second.flush()
    assert len(shards(tmp_path)) == 4 and not list(tmp_path.glob("*/.tmp*"))
    third, _ = recording(policy, tmp_path)
    for batch in batches:
        third.run(batch, 1.0, key32(1, 0))
    assert (third.hits, third.computed) == (7, 0)


def test_a_disk_that_refuses_costs_one_line(filled, monkeypatch):
    policy, method, folder = filled
    notes = []
    cache = cached(policy, method, folder / "new", notes.append)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for seed in range(2):
        pairs = helpers.ragged_pairs(4, seed=seed)
        live = helpers.loss_and_gradient(policy, method, pairs)
        found = helpers.loss_and_gradient(policy, method, pairs, execution=cache)
        assert found[0] == live[0] and torch.equal(found[1], live[1])
        cache.flush()
    assert len(notes) == 1 and notes[0].endswith("is not written any further: No space left on device")
    assert not [path for path in (folder / "new").rglob("*") if path.is_file()]


def test_numbers_that_are_not_finite_are_not_written(filled, monkeypatch):
    policy, method, folder = filled
    monkeypatch.setattr(
        reference_cache, "reference_token_logps", lambda policy, batch: torch.full(batch.scored_targets.shape, math.nan)
    )
    cache, _ = recording(policy, folder / "new")
    cache.run(method.micro_batches(PAIRS)[0], 1.0, key32(1, 0))
    cache.flush()
    assert not shards(folder / "new")
