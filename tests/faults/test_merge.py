"""Damaged adapters do not become models."""

import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.faulting.processes import lowlevel
from lowlevel.model.adapters import read_adapter_weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_a_number_that_is_none_is_not_merged(sft, value):
    folder = sft.copy(sft.whole.folder)
    weights = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    tensors[name].flat[0] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    out = folder.parent / "merged"
    ended = lowlevel(["merge", str(folder), "--out", str(out)], folder)
    assert ended.code == 4 and "1 tensor not finite" in ended.err and name in ended.err
    assert not out.exists() and not list(folder.parent.glob(".tmp*"))


def test_merging_the_same_run_twice_gives_the_same_bytes_and_leaves_the_run(sft):
    folder = sft.copy(sft.whole.folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    merged = [folder.parent / name for name in ("one", "two")]
    for out in merged:
        ended = lowlevel(["merge", str(folder), "--out", str(out)], folder)
        assert ended.code == 0, ended.said
    one, two = ((out / "model.safetensors").read_bytes() for out in merged)
    assert one == two
    assert before == {path: path.read_bytes() for path in before}
    assert read_adapter_weights(folder / "adapter")


def test_a_merged_model_loads_bit_for_bit_as_it_was_written(sft):
    import torch
    from safetensors.torch import load_file as load_tensors
    from transformers import AutoModelForCausalLM

    out = sft.new() / "merged"
    ended = lowlevel(["merge", str(sft.whole.folder), "--out", str(out)], out.parent)
    assert ended.code == 0, ended.said
    written = load_tensors(out / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert written.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
