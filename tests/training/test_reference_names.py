"""What an entry of the reference cache and its folder are named by: all that the numbers depend on, no more."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from reference_caching import PAIRS, SPANS, cached, identity_of, recording, shards

from lowlevel import reference_cache
from lowlevel.determinism import deterministic_mode
from lowlevel.hashing import key32
from lowlevel.model.adapters import adapter_sha256
from lowlevel.reference_cache import content_sha256, with_content


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
        cache.run(batch, 1.0, key32(1, 0))
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
    versions = {
        "LAYOUT_VERSION": 10**6,
        "KERNELS_VERSION": 10**6,
        "__version__": "0",
        "version": lambda name: f"{name} 0",
    }
    for name, value in versions.items():
        with monkeypatch.context() as patch:
            patch.setattr(reference_cache, name, value)
            others[name] = identity_of(again, same_parent)
    with deterministic_mode(True):
        others["deterministic"] = identity_of(again, same_parent)
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
