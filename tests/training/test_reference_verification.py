"""Entries of the reference cache are held to the live pass, and refused where they differ from it."""

import re

import helpers
import pytest
import torch
from reference_caching import PAIRS, alter, cached, identity_of, next_float, only, recording, shards

from lowlevel import reference_cache
from lowlevel.execution import WithFallback
from lowlevel.hashing import key32
from lowlevel.reference_cache import CachedReference, content_sha256, with_content


def test_every_hundredth_entry_from_disk_is_verified(filled, passes):
    policy, method, folder = filled
    cache, seen = recording(policy, folder)
    (batch, *_) = with_content(method.micro_batches)(PAIRS)
    verified = []
    for number in range(302):
        passes.clear()
        cache.run(batch, 1.0, key32(1, 0))
        verified += [number] * len(passes)
    assert verified == [0, 1, 100, 200, 300]
    assert cache.hits == 302 and all(torch.equal(b.reference_logps, seen[0].reference_logps) for b in seen)


def test_entries_of_this_run_are_not_verified(filled, passes):
    policy, method, folder = filled
    cache, seen = recording(policy, folder / "new")
    batches = method.micro_batches(PAIRS)
    for batch in (*batches, *batches):
        cache.run(batch, 1.0, key32(1, 0))
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
    assert note.endswith("; continuing with the live pass")
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
    cache.run(helpers.dpo(1).micro_batches(PAIRS)[0], 1.0, key32(1, 0))  # a new one, not yet written
    for _ in range(100):
        cache.run(good, 1.0, key32(1, 0))
    assert not notes and cache.computed == 1
    with pytest.raises(reference_cache.ExecutionFailedError):
        cache.run(bad, 1.0, key32(1, 0))
    assert len(notes) == 1
    cache.run(bad, 1.0, key32(1, 0))
    cache.run(good, 1.0, key32(1, 0))
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
    assert notes == ["execution: compiled failed (no compiler here); continuing eager"]
    assert found[0] == live[0] and torch.equal(found[1], live[1])
    assert cache.hits == len(method.micro_batches(PAIRS)), "those of eager layers, from disk"


@pytest.mark.parametrize("failing", [(0,), (0, 1, 2), (100,), (100, 101)])
def test_a_check_that_fails_is_made_up_for_at_the_next_entry(filled, passes, monkeypatch, failing):
    """A pass that fails checks nothing: the micro-batch goes without reference numbers, for the execution to mend."""
    policy, method, folder = filled
    cache, seen = recording(policy, folder)
    (batch, *_) = with_content(method.micro_batches)(PAIRS)
    whole, verified = reference_cache.reference_token_logps, []
    for number in range(104):
        with monkeypatch.context() as patch:
            if number in failing:
                patch.setattr(
                    reference_cache, "reference_token_logps", lambda *_: (_ for _ in ()).throw(RuntimeError())
                )
            passes.clear()
            cache.run(batch, 1.0, key32(1, 0))
            verified += [number] * len(passes)
    assert reference_cache.reference_token_logps is whole
    late = len(failing)
    assert verified == ([late, late + 1, late + 100] if failing[0] == 0 else [0, 1, 100 + late])
    assert [number for number, b in enumerate(seen) if b.reference_logps is None] == list(failing)
    assert cache.hits == 104 - late and not cache.refused
