"""Inputs of recomputed layers in pinned memory: the same bits in every mode of execution, and less on the GPU."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import CUDA, fill_lora_b, small_model, small_policy
from torch.utils.checkpoint import checkpoint

from lowlevel.batch.layout import Shape
from lowlevel.config.offline import DPOConfig, SFTConfig
from lowlevel.determinism import deterministic_mode
from lowlevel.execution import ExecutionFailedError, WithFallback
from lowlevel.hashing import key32
from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT
from lowlevel.model.offload import HostInputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LAYERS, HIDDEN = 8, 512
SHAPE = Shape(positions=128, examples=8, longest=1024, capacity=4096)
METHODS = {
    "sft": SFT(SFTConfig(), 4, 1024, True, SHAPE),
    "dpo": DPO(DPOConfig(disable_dropout=False), 4, 1024, True, SHAPE),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 1024, "num_hidden_layers": LAYERS}
    return small_model(tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture(autouse=True)
def deterministic():
    """Attention's backward pass adds in a fixed order."""
    with deterministic_mode(True):
        yield


def policy(model_dir, *, offload, recomputed=None):
    made = small_policy(model_dir, recomputed=recomputed, offload=offload)
    fill_lora_b(made, 0.02, 1)
    return made


def batch_of(method, count, length):
    """The one micro-batch of `count` examples of some `length` positions."""
    rng = np.random.default_rng(0)

    def ids(size):
        return rng.integers(3, 1000, size)

    if method.name == "dpo":
        third = length // 3
        rows = [SimpleNamespace(row=i, prompt_ids=ids(third), chosen_ids=ids(third), rejected_ids=ids(third - i))
                for i in range(count)]  # fmt: skip
    else:
        rows = [SimpleNamespace(row=i, input_ids=(x := ids(length - i)), labels=x, weights=None) for i in range(count)]
    (batch,) = method.micro_batches(rows)
    return batch.to(CUDA)


def micro_steps(one, method, mode):
    """Loss and gradient of a small batch twice, a larger one three times, and the small one; and the retried ones."""
    small, large = batch_of(method, 2, 300), batch_of(method, 4, 900)
    assert small.input_ids.numel() < large.input_ids.numel()
    execution = WithFallback(one, method, mode, pytest.fail)
    found, retried = [], []
    for step, batch in enumerate([small, small, large, large, large, small]):
        while True:
            one.flat.grad.zero_()
            try:
                sums = execution.run(batch, 1024.0, key32(1, step)).named()
                break
            except ExecutionFailedError:
                retried.append(step)
        found.append((sums["loss"].item(), one.flat.grad.clone()))
    assert execution.mode == mode
    one.layers.use(compiled=False)
    return found, retried


@pytest.mark.parametrize("recomputed", [None, 3])
@pytest.mark.parametrize("mode", ["eager", "compiled", "graphed"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_bits_with_a_larger_shape_after_a_smaller_one(model_dir, name, mode, recomputed):
    method, runs = METHODS[name], []
    for offload in (False, False, True):
        runs.append(micro_steps(policy(model_dir, offload=offload, recomputed=recomputed), method, mode))
    (plain, _), (again, _), (offloaded, retried) = runs
    assert retried == ([2] if mode == "graphed" else [])  # no room for the larger shape yet, and none can be pinned
    for step, (expected, repeated, found) in enumerate(zip(plain, again, offloaded, strict=True)):
        if step in retried:
            continue  # uncaptured here, captured there
        assert torch.equal(repeated[1], expected[1]), (
            "without offloading, a second run gives other bits: cannot compare"
        )
        assert found[0] == expected[0], (step, found[0], expected[0])
        assert torch.equal(found[1], expected[1]), (step, (found[1] - expected[1]).abs().max().item())
    assert plain[2][1].norm() > 0 and not torch.equal(plain[2][1], plain[3][1])  # another step has other dropout


@pytest.mark.parametrize("mode", ["eager", "compiled", "graphed"])
def test_the_peak_falls_by_the_inputs_of_all_layers_but_two(model_dir, mode):
    method, peaks = METHODS["sft"], []
    batch = batch_of(method, 4, 900)
    for offload in (False, True):
        one = policy(model_dir, offload=offload)
        execution = WithFallback(one, method, mode, pytest.fail)
        execution.run(batch, 1024.0, key32(1, 0))  # sets up compilers, libraries, pinned memory
        torch.cuda.synchronize()
        gc.collect()  # the policy before this one
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in range(3):
            execution.run(batch, 1024.0, key32(1, step))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert execution.mode == mode
        if one.layers.host:
            buffers = one.layers.host._buffers
            assert len(buffers) == LAYERS and all(buffer.is_pinned() for buffer in buffers.values())
    each = batch.input_ids.numel() * HIDDEN * 2
    fall = (peaks[0] - peaks[1]) / each
    assert LAYERS - 2.5 <= fall <= LAYERS + 0.5, f"the peak fell by {fall:.2f} inputs of {LAYERS}"


def test_copies_are_captured_and_replayed_on_other_numbers():
    """Large enough that a copy outlasts a layer: a missing join would show."""
    host, x = HostInputs(CUDA), torch.randn(4096, 4096, device=CUDA, requires_grad=True)

    def gradient():
        y = x
        for number in range(6):
            with host.keeping(number):
                y = checkpoint(lambda z: torch.sin(z) * z, y, use_reentrant=False, preserve_rng_state=False)
        return torch.autograd.grad(y.sum(), x)[0]

    def expected():
        y = x
        for _ in range(6):
            y = torch.sin(y) * y
        return torch.autograd.grad(y.sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(gradient(), expected())  # and makes the buffers
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = gradient()
    for seed in range(3):
        with torch.no_grad():
            x.normal_(generator=torch.Generator(CUDA).manual_seed(seed))
        graph.replay()
        assert torch.equal(found, expected())


def test_a_capture_without_room_says_so():
    host, x = HostInputs(CUDA), torch.randn(8, 8, device=CUDA, requires_grad=True)
    with pytest.raises(RuntimeError, match="layer 0: cannot pin 256 bytes on the host during a graph capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()), host.keeping(0):
            checkpoint(torch.sin, x, use_reentrant=False, preserve_rng_state=False)
