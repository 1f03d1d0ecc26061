"""Cached reference numbers are the live pass's, bit for bit, or are refused; and no pass is made that they spare.

Whole runs are compared by every logged number and by the adapter's hash; single steps by metrics and flat gradient.
"""

import errno
import json
import math
import os
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import tomli_w
import torch
from rich.console import Console
from safetensors.torch import load_file, save

from lowlevel import reference_cache
from lowlevel.assembly import check_inputs
from lowlevel.cli import main
from lowlevel.config import DPOConfig, load_config
from lowlevel.dpo import DPO, completion_logps
from lowlevel.errors import InterruptedRunError
from lowlevel.execution import Eager, WithFallback, signature_of
from lowlevel.layout import Shape
from lowlevel.model.adapters import adapter_sha256
from lowlevel.model.base import base_sha256
from lowlevel.model.policy import Policy
from lowlevel.reference_cache import CachedReference, content_sha256, reference_identity, with_blanks, with_content
from lowlevel.run import RunObserver, run_training

SHAPE = Shape(positions=16, examples=4, longest=64, capacity=128)
SPANS = "lowlevel_math"
PAIRS = helpers.ragged_pairs(7)  # not a multiple of SHAPE.examples: some batches hold fillers


@pytest.fixture
def passes(monkeypatch):
    """Counts reference passes from here on."""
    counted, original = [], Policy.reference

    @contextmanager
    def reference(self):
        counted.append(1)
        with original(self):
            yield

    monkeypatch.setattr(Policy, "reference", reference)
    return counted


def identity_of(policy, parent=None):
    return reference_identity(policy, base_sha256(policy.model), adapter_sha256(parent) if parent else None)


def cached(policy, method, folder, note=pytest.fail, parent=None):
    """A cache over plain execution; by default any line that it prints is a failure."""
    return CachedReference(Eager(policy, method), policy, folder, identity_of(policy, parent), note)


class Recorder:
    """An execution that keeps the batches that it gets."""

    def __init__(self):
        self.batches = []

    def run(self, batch, factor, seed, step, kept=None):
        self.batches.append(batch)
        return {}


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
    shard.with_suffix(".json").unlink()
    shard.unlink()
    reference_cache.write_shard(shard.parent, {k: v for k, v in entries.items() if v is not None})


def next_float(values):
    """The next larger fp32 numbers."""
    return torch.nextafter(values, torch.full_like(values, torch.inf))


# One step

STEPS = [
    (packing, shape, attention, dropout)
    for packing in (True, False)
    for shape, attention in ((None, "sdpa"), (None, SPANS), (SHAPE, SPANS))
    for dropout in (True, False)
]


@pytest.mark.parametrize(("packing", "shape", "attention", "dropout"), STEPS)
def test_a_cached_step_is_the_live_step_bit_for_bit(
    tiny_base, parent_adapter, tmp_path, passes, packing, shape, attention, dropout
):
    method = DPO(DPOConfig(disable_dropout=not dropout), 2, 64, packing, shape)
    policy = helpers.make_policy(tiny_base, dropout=0.3, parent=parent_adapter, attention=attention)
    live = helpers.step(policy, method, PAIRS)
    wanted, count = policy.flat.grad.clone(), len(method.micro_batches(PAIRS))
    assert count > 1 and live.metrics["rewards/margins"] != 0
    for name, hits, computed in (("cold", 0, count), ("warm", count, 0)):
        cache = cached(policy, method, tmp_path, parent=parent_adapter)
        passes.clear()
        result = helpers.step(policy, method, PAIRS, execution=cache)
        assert result.metrics == live.metrics and result.grad_norm == live.grad_norm, name
        assert torch.equal(policy.flat.grad, wanted), name
        assert (cache.hits, cache.computed) == (hits, computed)
        assert len(passes) == (count if name == "cold" else 2), "two of the warm ones are verified"
        cache.flush()
    assert len(shards(tmp_path)) == 1


@pytest.mark.parametrize("loss_type", ["ipo", "rpo", "sigmoid_norm"])
def test_a_cache_of_one_loss_serves_another(tiny_base, tmp_path, loss_type):
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    first, other = (DPO(DPOConfig(loss_type=name, beta=0.4), 4, 64, True, SHAPE) for name in ("sigmoid", loss_type))
    cache = cached(policy, first, tmp_path)
    helpers.step(policy, first, PAIRS, execution=cache)
    cache.flush()
    wanted = helpers.loss_and_gradient(policy, other, PAIRS)
    cache = cached(policy, other, tmp_path)
    loss, gradient = helpers.loss_and_gradient(policy, other, PAIRS, execution=cache)
    assert loss == wanted[0] and torch.equal(gradient, wanted[1])
    assert cache.computed == 0 < cache.hits


def test_compiled_layers_have_entries_of_their_own(tiny_base, tmp_path):
    torch._dynamo.reset()
    policy = helpers.make_policy(tiny_base, dropout=0.3, attention=SPANS)
    method = DPO(DPOConfig(), 4, 64, True, SHAPE)
    cache = cached(policy, method, tmp_path)
    helpers.step(policy, method, PAIRS, execution=cache)
    cache.flush()
    policy.layers.use(compiled=True)
    live = helpers.loss_and_gradient(policy, method, PAIRS)
    for computed in (True, False):
        cache = cached(policy, method, tmp_path)
        loss, gradient = helpers.loss_and_gradient(policy, method, PAIRS, execution=cache)
        assert loss == live[0] and torch.equal(gradient, live[1])
        assert bool(cache.computed) == computed and bool(cache.hits) != computed
        cache.flush()
    layers = {json.loads(path.read_text())["layers"] for path in tmp_path.glob("*/identity.json")}
    assert layers == {"compiled", "eager"} and len(shards(tmp_path)) == 2


def test_entries_are_what_completion_logps_says_and_fillers_are_0(tiny_base, tmp_path):
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    method = DPO(DPOConfig(), 4, 64, True, SHAPE)
    cache, seen = recording(policy, tmp_path)
    batches = method.micro_batches(PAIRS)
    for batch in batches:
        cache.run(batch, 1.0, 1, 0)
    cache.flush()
    sums = method.loss(policy, seen[0]).metrics
    chosen, rejected = seen[0].reference_logps.chunk(2)
    assert (sums["logps/ref_chosen"], sums["logps/ref_rejected"]) == (chosen.sum(), rejected.sum())
    entries = load_file(only(shards(tmp_path)))
    assert entries.keys() == {content_sha256(batch) for batch in batches}
    for batch, given in zip(batches, seen, strict=True):
        with policy.reference():
            chosen, rejected = completion_logps(policy, batch)
        entry, pairs = entries[content_sha256(batch)], len(batch.real)
        assert entry.dtype == torch.float32 and torch.equal(entry, given.reference_logps)
        assert torch.equal(entry[:pairs], chosen) and torch.equal(entry[pairs:], rejected)
        assert torch.equal(entry != 0, batch.real.repeat(2))
    assert not all(batch.real.all() for batch in batches)


def test_a_captured_graph_would_see_the_reference(tiny_base):
    """It copies every tensor of a batch into its own, and has another signature where there are others."""
    (batch,) = helpers.dpo(8, packing=True, row_length=256).micro_batches(PAIRS)
    given = replace(batch, reference_logps=torch.zeros(len(batch.lengths)), content="x")
    assert signature_of(given) == signature_of(with_blanks(batch)), "the rehearsal captures what the run replays"
    assert "reference_logps" in given.tensors() and "reference_logps" not in batch.tensors()
    assert signature_of(given) != signature_of(batch) == signature_of(replace(batch, content="x"))


# What an entry and a folder are named by


def test_the_key_sees_content_and_layout_and_nothing_else():
    method = helpers.dpo(4, packing=True)
    batch = method.micro_batches(PAIRS)[0]
    key = content_sha256(batch)
    assert key == content_sha256(helpers.dpo(4, packing=True, beta=0.7).micro_batches(PAIRS)[0])
    renumbered = [replace(pair, row=pair.row + 1) for pair in PAIRS]
    assert key == content_sha256(method.micro_batches(renumbered)[0]), "another data row, the same tokens"
    assert key == content_sha256(replace(batch, reference_logps=torch.zeros(8)))
    changed = {"longest": content_sha256(replace(batch, longest=batch.longest + 1))}
    for name, tensor in batch.tensors().items():
        if name != "dropout_keys":
            other = tensor.clone()
            other.view(-1)[-1] = ~other.view(-1)[-1] if tensor.dtype == torch.bool else other.view(-1)[-1] + 1
            changed[name] = content_sha256(batch.with_tensors({name: other}))
            changed[f"{name} as one row"] = content_sha256(batch.with_tensors({name: tensor[None]}))
    assert len({key, *changed.values()}) == len(changed) + 1
    assert {"input_ids", "position_ids", "segment_ids", "branch_ids", "targets", "span_keys"} < changed.keys()


def test_a_pair_in_other_company_is_another_entry():
    packed, alone = helpers.dpo(4, packing=True), helpers.dpo(1)
    keys = [content_sha256(b) for method in (packed, alone) for b in method.micro_batches(PAIRS)]
    assert len(set(keys)) == len(keys)


def test_the_hash_is_taken_before_the_batch_moves(tiny_base, tmp_path, monkeypatch):
    policy, method = helpers.make_policy(tiny_base), helpers.dpo(4)
    batches = with_content(method.micro_batches)(PAIRS)
    assert [batch.content for batch in batches] == [content_sha256(b) for b in method.micro_batches(PAIRS)]
    assert all(batch.to(torch.device("meta")).content == batch.content for batch in batches)
    cache, seen = recording(policy, tmp_path)
    monkeypatch.setattr(reference_cache, "content_sha256", pytest.fail)
    for batch in batches:
        cache.run(batch, 1.0, 1, 0)
    assert cache.computed == len(batches) == len(seen)


def edited(folder: Path, copy: Path, file: str, **changes) -> Path:
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


def test_an_identity_names_all_that_the_numbers_depend_on(tiny_base, parent_adapter, tmp_path, monkeypatch):
    first = identity_of(helpers.make_policy(tiny_base, parent=parent_adapter), parent_adapter)
    same_base = shutil.copytree(tiny_base, tmp_path / "same base")
    same_parent = shutil.copytree(parent_adapter, tmp_path / "same parent")
    again = helpers.make_policy(same_base, parent=same_parent, seed=3, dropout=0.2)
    assert identity_of(again, same_parent) == first, "where files lie and what is trained does not matter"
    json.dumps(first)

    other_parent = helpers.save_random_adapter(tiny_base, tmp_path / "other parent", seed=6)
    stronger = edited(parent_adapter, tmp_path / "stronger", "adapter_config.json", lora_alpha=16)
    assert adapter_sha256(stronger) == adapter_sha256(parent_adapter)
    turned = edited(tiny_base, tmp_path / "turned", "config.json", rms_norm_eps=1e-3)
    kinds = {
        "4 bits": {"quantised": True},
        "attention": {"attention": SPANS},
        "bf16": {"placement": replace(helpers.CPU, precision="bf16")},
    }
    others = {
        "no parent": identity_of(helpers.make_policy(tiny_base)),
        "other parent": identity_of(helpers.make_policy(tiny_base, parent=other_parent), other_parent),
        "stronger parent": identity_of(helpers.make_policy(tiny_base, parent=stronger), stronger),
        "base config": identity_of(helpers.make_policy(turned, parent=parent_adapter), parent_adapter),
    }
    for name, settings in kinds.items():
        others[name] = identity_of(helpers.make_policy(tiny_base, parent=parent_adapter, **settings), parent_adapter)
    for name, value in (("LAYOUT_VERSION", 10**6), ("__version__", "0"), ("version", lambda name: f"{name} 0")):
        with monkeypatch.context() as patch:
            patch.setattr(reference_cache, name, value)
            others[name] = identity_of(again, same_parent)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others["threads"] = identity_of(again, same_parent)
    torch.set_num_threads(threads)
    assert len({json.dumps(i, sort_keys=True) for i in (first, *others.values())}) == len(others) + 1


def test_another_parent_finds_nothing(tiny_base, parent_adapter, tmp_path):
    method = helpers.dpo(4)
    other = helpers.save_random_adapter(tiny_base, tmp_path / "other", seed=6)
    for parent in (parent_adapter, other):
        policy = helpers.make_policy(tiny_base, parent=parent)
        cache = cached(policy, method, tmp_path / "cache", parent=parent)
        live = helpers.loss_and_gradient(policy, method, PAIRS)
        found = helpers.loss_and_gradient(policy, method, PAIRS, execution=cache)
        assert found[0] == live[0] and torch.equal(found[1], live[1])
        assert (cache.hits, cache.computed) == (0, 2)
        cache.flush()
    assert len(shards(tmp_path / "cache")) == 2
    for path in (tmp_path / "cache").iterdir():
        identity = json.loads((path / "identity.json").read_text())
        assert path.name == reference_cache._json_sha256(identity)


# What is wrong on disk


@pytest.fixture
def filled(tiny_base, tmp_path):
    """A policy, a method, and a folder with a shard of its micro-batches."""
    policy, method = helpers.make_policy(tiny_base, attention=SPANS), DPO(DPOConfig(), 2, 64, True, SHAPE)
    cache, _ = recording(policy, tmp_path)
    for batch in method.micro_batches(PAIRS):
        cache.run(batch, 1.0, 1, 0)
    cache.flush()
    return policy, method, tmp_path


def test_every_hundredth_entry_from_disk_is_verified(filled, passes):
    policy, method, folder = filled
    cache, seen = recording(policy, folder)
    (batch, *_) = with_content(method.micro_batches)(PAIRS)
    verified = []
    for number in range(302):
        passes.clear()
        cache.run(batch, 1.0, 1, 0)
        verified += [number] * len(passes)
    assert verified == [0, 1, 100, 200, 300]
    assert cache.hits == 302 and all(torch.equal(b.reference_logps, seen[0].reference_logps) for b in seen)


def test_entries_of_this_run_are_not_verified(filled, passes):
    policy, method, folder = filled
    cache, seen = recording(policy, folder / "new")
    batches = method.micro_batches(PAIRS)
    for batch in (*batches, *batches):
        cache.run(batch, 1.0, 1, 0)
        cache.flush()
    assert len(passes) == len(batches) == cache.computed == cache.hits
    first, again = seen[: len(batches)], seen[len(batches) :]
    assert all(torch.equal(a.reference_logps, b.reference_logps) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("place", [0, 1])
def test_an_altered_number_is_refused_and_the_step_is_live(filled, place, passes):
    """By one unit in the last place, in a shard whose hashes are right, in the first or second micro-batch."""
    policy, method, folder = filled
    batches = method.micro_batches(PAIRS)
    wrong = content_sha256(batches[place])
    pair = 1  # the second pair's rejected completion

    def change(key, value):
        if key == wrong:
            value[len(value) // 2 + pair] = next_float(value[len(value) // 2 + pair])
        return value

    live = helpers.loss_and_gradient(policy, method, PAIRS)
    alter(only(shards(folder)), change)
    notes = []
    cache = cached(policy, method, folder, notes.append)
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        found = helpers.loss_and_gradient(policy, method, PAIRS, execution=cache)
        assert found[0] == live[0] and torch.equal(found[1], live[1])
    (note,) = notes
    assert "\n" not in note and str(next(folder.iterdir())) in note
    expected = r"reference cache: refused: largest difference (\S+) \(rejected, data row (\d+): (\S+), live (\S+)\)"
    difference, row, stored, lived = re.match(expected, note).groups()
    assert int(row) == batches[place].data_rows[pair]
    assert float(difference) == pytest.approx(float(stored) - float(lived), rel=0.05) and 0 < float(difference) < 1e-4
    assert note.endswith("; going on with the live pass")
    assert cache.refused
    with cache:
        pass
    assert ", then refused" in notes[1]
    assert cache.hits == place, "what was found before it"
    cache.flush()
    assert sorted(folder.rglob("*")) == before


def test_an_altered_number_in_a_later_micro_batch_is_refused_when_its_turn_comes(filled):
    policy, method, folder = filled
    good, bad, *_ = with_content(method.micro_batches)(PAIRS)
    alter(only(shards(folder)), lambda key, value: next_float(value) if key == bad.content else value)
    notes = []
    cache, seen = recording(policy, folder, notes.append)
    cache.run(helpers.dpo(1).micro_batches(PAIRS)[0], 1.0, 1, 0)  # a new one, not yet written
    for _ in range(100):
        cache.run(good, 1.0, 1, 0)
    assert not notes and cache.computed == 1
    with pytest.raises(reference_cache.ExecutionFailedError):
        cache.run(bad, 1.0, 1, 0)
    assert len(notes) == 1
    cache.run(bad, 1.0, 1, 0)
    cache.run(good, 1.0, 1, 0)
    assert [batch.reference_logps is None for batch in seen] == [False] * 101 + [True] * 2
    cache.flush()
    assert len(shards(folder)) == 1, "nothing is written beside what was refused"


def test_an_entry_of_another_shape_is_refused(filled):
    policy, method, folder = filled
    live = helpers.loss_and_gradient(policy, method, PAIRS)
    alter(only(shards(folder)), lambda key, value: value[:-1])
    notes = []
    cache = cached(policy, method, folder, notes.append)
    found = helpers.loss_and_gradient(policy, method, PAIRS, execution=cache)
    assert found[0] == live[0] and torch.equal(found[1], live[1])
    assert len(notes) == 1 and re.search(r"refused: an entry has shape \(\d+,\), not \(\d+,\), in ", notes[0])


def flip(shard):
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)


def other_numbers(shard):
    entries = {key: value.double() for key, value in load_file(shard).items()}
    rewrite(shard, save(entries))


def rewrite(shard, data):
    """Another content under the same name, described correctly."""
    shard.write_bytes(data)
    manifest = shard.with_suffix(".json")
    described = {**json.loads(manifest.read_text()), "bytes": len(data), "sha256": reference_cache._sha256(data)}
    manifest.write_text(json.dumps(described))


DAMAGE = {
    "a flipped bit": (flip, "its content does not match"),
    "cut short": (lambda shard: shard.write_bytes(shard.read_bytes()[:-8]), "its content does not match"),
    "gone": (lambda shard: shard.unlink(), "cannot be read: FileNotFoundError"),
    "no JSON": (lambda shard: shard.with_suffix(".json").write_text("{"), "cannot be read: JSONDecodeError"),
    "a list": (lambda shard: shard.with_suffix(".json").write_text("[]"), "cannot be read: TypeError"),
    "an empty description": (lambda shard: shard.with_suffix(".json").write_text("{}"), "cannot be read: KeyError"),
    "no safetensors": (lambda shard: rewrite(shard, b"x" * 40), "cannot be read: SafetensorError"),
    "another dtype": (other_numbers, "holds no finite fp32 numbers"),
    "not finite": (lambda shard: alter(shard, lambda key, value: value / 0.0), "holds no finite fp32 numbers"),
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


def test_a_shard_without_its_description_is_not_read(filled, monkeypatch):
    """As a crash leaves it: between the two files, or in the middle of one."""
    policy, method, folder = filled
    shard = only(shards(folder))
    shard.with_suffix(".json").unlink()
    (shard.parent / f".tmp-{shard.name}-1").write_bytes(b"half")
    (shard.parent / f".tmp-{shard.with_suffix('.json').name}-1").write_text("{")
    cache, _ = recording(policy, folder)
    for batch in method.micro_batches(PAIRS):
        cache.run(batch, 1.0, 1, 0)
    assert cache.hits == 0
    order = []
    write_bytes, write_json = reference_cache.write_bytes, reference_cache.write_json
    monkeypatch.setattr(reference_cache, "write_bytes", lambda *a: (order.append("shard"), write_bytes(*a)))
    monkeypatch.setattr(reference_cache, "write_json", lambda *a: (order.append("json"), write_json(*a)))
    cache.flush()
    assert order == ["shard", "json"] and len(shards(folder)) == 1, "the same entries have the same name"
    assert recording(policy, folder)[0]._cache().from_disk


def test_processes_share_a_folder_and_shards_add_up(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "ENTRIES_PER_SHARD", 3)
    policy, method = helpers.make_policy(tiny_base), helpers.dpo(1)
    first, second = (recording(policy, tmp_path)[0] for _ in range(2))  # neither sees what the other writes
    batches = method.micro_batches(PAIRS)
    for cache, part in ((first, batches[:4]), (second, batches[3:])):
        for batch in part:
            cache.run(batch, 1.0, 1, 0)
        assert cache.computed == 4
    assert len(shards(tmp_path)) == 2, "three entries each; the fourth is not yet written"
    first.flush()
    second.flush()
    assert len(shards(tmp_path)) == 4 and not list(tmp_path.glob("*/.tmp*"))
    third, _ = recording(policy, tmp_path)
    for batch in batches:
        third.run(batch, 1.0, 1, 0)
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
    assert len(notes) == 1 and notes[0].endswith("is not written any more: No space left on device")
    assert not [path for path in (folder / "new").rglob("*") if path.is_file()]


def test_numbers_that_are_not_finite_are_not_written(filled, monkeypatch):
    policy, method, folder = filled
    monkeypatch.setattr(
        reference_cache, "reference_token_logps", lambda policy, batch: torch.full(batch.scored_targets.shape, math.nan)
    )
    cache, _ = recording(policy, folder / "new")
    cache.run(method.micro_batches(PAIRS)[0], 1.0, 1, 0)
    cache.flush()
    assert not shards(folder / "new")


def test_a_pass_that_cannot_be_compiled_is_the_executions_to_mend(filled, monkeypatch):
    policy, method, folder = filled
    live = helpers.loss_and_gradient(policy, method, PAIRS)
    original = reference_cache.reference_token_logps

    def broken(policy, batch):
        if policy.layers.compiled:
            raise RuntimeError("no compiler here")
        return original(policy, batch)

    class Broken:
        def run(self, batch, *arguments):
            assert batch.reference_logps is None
            raise RuntimeError("no compiler here")

    notes = []
    execution = WithFallback(policy, method, "compiled", notes.append)
    execution.execution = Broken()
    monkeypatch.setattr(reference_cache, "reference_token_logps", broken)
    cache = CachedReference(execution, policy, folder, identity_of(policy), pytest.fail)
    found = helpers.loss_and_gradient(policy, method, PAIRS, execution=cache)
    assert notes == ["execution: compiled failed (no compiler here); going on eager"]
    assert found[0] == live[0] and torch.equal(found[1], live[1])
    assert cache.hits == len(method.micro_batches(PAIRS)), "those of eager layers, from disk"


# Whole runs

ROWS, STEPS_OF_RUN = 7, 8  # batch 2 x accumulation 1: 4 steps an epoch, 2 epochs


@pytest.fixture(scope="module")
def workspace(tiny_base, parent_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached runs")
    texts = [f"{'very ' * (i % 4)}short text number {i}" for i in range(ROWS + 2)]
    pairs = [{"prompt": t, "chosen": t[::-1], "rejected": "no " * (1 + i % 3)} for i, t in enumerate(texts)]
    return folder, tiny_base, parent_adapter, helpers.write_jsonl(folder / "dpo.jsonl", pairs)


def write_run(workspace, name, *, cache=None, order="shuffled", beta=0.1, **train) -> Path:
    folder, base, parent, rows = workspace
    tables = {
        "method": "dpo",
        "model": {"name": str(base), "adapter": str(parent)},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {"source": str(rows), "format": "preference", "max_length": 128,
                 "eval_source": "holdout", "eval_limit": 2},
        "dpo": {"beta": beta, "disable_dropout": False, **({"reference_cache": str(cache)} if cache else {})},
        "train": {"output_dir": str(folder / name), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                  "learning_rate": 5e-3, "num_train_epochs": 2, "logging_steps": 1, "data_order": order, **train},
    }  # fmt: skip
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def run(config: Path, **arguments) -> str:
    """What a run prints."""
    with open(config.with_suffix(".log"), "w") as file:
        run_training(load_config(config), Console(file=file, width=1000), **arguments)
    return config.with_suffix(".log").read_text()


def outcome(config: Path):
    """Every logged number but those of a clock, and the adapter's hash."""
    folder = config.with_suffix("")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]
    assert len(logged) == STEPS_OF_RUN + 2, "two evaluations"
    return logged, adapter_sha256(folder / "adapter")


@pytest.fixture(scope="module")
def live(workspace):
    """The runs without a cache, by (order, beta)."""
    found = {}
    for order, beta in (("shuffled", 0.1), ("shuffled", 0.3), ("sequential", 0.1)):
        config = write_run(workspace, f"live-{order}-{beta}", order=order, beta=beta)
        assert "reference cache" not in run(config)
        found[order, beta] = outcome(config)
    return found


EVALUATION = 2  # reference passes of the two evaluations, of one micro-batch each
AT_LOADING = 1  # and of the check of the LM head


def test_a_run_with_another_beta_makes_no_reference_pass(workspace, live, passes):
    cache = workspace[0] / "cache-beta"
    cold = write_run(workspace, "cold", cache=cache)
    printed = run(cold)
    assert f"reference cache: 0 micro-batches found, {STEPS_OF_RUN} computed ({cache})" in printed
    assert outcome(cold) == live["shuffled", 0.1]
    assert len(passes) == STEPS_OF_RUN + EVALUATION + AT_LOADING
    passes.clear()
    warm = write_run(workspace, "warm", cache=cache, beta=0.3)
    printed = run(warm)
    assert printed.count("reference cache") == 1
    assert f"reference cache: {STEPS_OF_RUN} micro-batches found, 0 computed ({cache})" in printed
    assert outcome(warm) == live["shuffled", 0.3] != live["shuffled", 0.1]
    assert len(passes) == 2 + EVALUATION + AT_LOADING, "two are verified, all others are spared"


def test_the_second_epoch_of_a_sequential_run_makes_none(workspace, live, passes):
    config = write_run(workspace, "sequential", cache=workspace[0] / "cache-sequential", order="sequential")
    printed = run(config)
    assert f"reference cache: {STEPS_OF_RUN // 2} micro-batches found, {STEPS_OF_RUN // 2} computed" in printed
    assert outcome(config) == live["sequential", 0.1]
    assert len(passes) == STEPS_OF_RUN // 2 + EVALUATION + AT_LOADING


@pytest.mark.parametrize("keep", [True, False])
def test_a_resumed_run_is_the_same_run(workspace, live, keep, monkeypatch):
    """With the cache that it began with, or with another one: the key may differ, since it changes nothing learned."""
    cache, stop = workspace[0] / f"cache-resumed-{keep}", 3
    config = write_run(workspace, f"resumed-{keep}", cache=cache)
    progress = RunObserver.progress

    def stopping(self, state, result):
        progress(self, state, result)
        if state.step == stop:
            self.on_signal(signal.SIGTERM, None)

    with monkeypatch.context() as patch:
        patch.setattr(RunObserver, "progress", stopping)
        with pytest.raises(InterruptedRunError):
            run(config)
    assert f"0 micro-batches found, {stop} computed" in config.with_suffix(".log").read_text()
    assert len(load_file(only(shards(cache)))) == stop, "written with the checkpoint"
    other = cache if keep else workspace[0] / "cache-other"
    printed = run(write_run(workspace, f"resumed-{keep}", cache=other), resume=True)
    assert f"resumed from step-{stop:08d}" in printed
    assert f"0 micro-batches found, {STEPS_OF_RUN - stop} computed" in printed
    assert outcome(config) == live["shuffled", 0.1]
    again = write_run(workspace, f"after-{keep}", cache=cache, beta=0.3)
    found = STEPS_OF_RUN if keep else stop
    assert f"{found} micro-batches found, {STEPS_OF_RUN - found} computed" in run(again)
    assert outcome(again) == live["shuffled", 0.3]


def test_a_run_over_an_altered_cache_says_so_and_is_the_live_run(workspace, live):
    cache = workspace[0] / "cache-altered"
    run(write_run(workspace, "to be altered", cache=cache))
    alter(only(shards(cache)), lambda key, value: next_float(value))
    config = write_run(workspace, "altered", cache=cache)
    printed = run(config)
    assert printed.count("reference cache: refused: ") == 1 and "going on with the live pass" in printed
    assert ", then refused" in printed
    assert outcome(config) == live["shuffled", 0.1]


def test_a_folder_that_cannot_be_made_is_one_line_before_the_model_is_loaded(workspace, capsys, monkeypatch):
    taken = workspace[0] / "taken"
    taken.write_text("a file")
    config = write_run(workspace, "nowhere", cache=taken)
    monkeypatch.setattr("lowlevel.run.build_run_policy", pytest.fail)
    assert main(["dpo", str(config)]) == 2
    assert capsys.readouterr().err.strip() == f"error: dpo.reference_cache: {taken} cannot be made: File exists"
    assert not (config.with_suffix("") / "run-status.json").exists()
    check_inputs(load_config(write_run(workspace, "nowhere")))
