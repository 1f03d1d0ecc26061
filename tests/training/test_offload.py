"""Inputs of recomputed layers on the host: the same numbers bit for bit, and nothing else keeps them."""

import weakref

import helpers
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from workspace import make_workspace, metrics, run

from lowlevel.batch.layout import Shape
from lowlevel.config.offline import DPOConfig, SFTConfig
from lowlevel.execution import WithFallback
from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT
from lowlevel.model.attention_choice import NAMES
from lowlevel.model.offload import HostInputs

SHAPE = Shape(positions=16, examples=4, longest=64, capacity=96)
COMPILED = {"dropout": 0.1, "attention": NAMES["math"], "checkpointing": True}
METHODS = {
    "sft": (helpers.sft(2), helpers.ragged_examples()),
    "dpo": (helpers.dpo(2, disable_dropout=False), helpers.ragged_pairs()),
    "sft, packed": (SFT(SFTConfig(), 2, 48, True, SHAPE), helpers.ragged_examples()),
    "dpo, packed": (DPO(DPOConfig(disable_dropout=False), 2, 64, True, SHAPE), helpers.ragged_pairs()),
}


def growing(name):
    """The method, and examples of a step whose micro-batch is small, and of one with several and larger ones."""
    method, examples = METHODS[name]
    examples = sorted(examples, key=method.size)
    small, large = ([b.input_ids.numel() for b in method.micro_batches(rows)] for rows in (examples[:2], examples))
    assert len(small) == 1 and len(set(large)) > 1 and small[0] < max(large)
    return method, (examples[:2], examples)


def results(policy, name, **keys):
    """Loss and gradient of both steps, one after the other."""
    method, steps = growing(name)
    return [helpers.loss_and_gradient(policy, method, rows, number=n, **keys) for n, rows in enumerate(steps)]


@pytest.mark.parametrize("recomputed", [1, None])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_same_bit_for_bit(tiny_base, name, recomputed):
    settings = {"dropout": 0.1, "checkpointing": True, "recomputed": recomputed}
    policy, plain = (helpers.make_policy(tiny_base, **settings, offload=offload) for offload in (True, False))
    for (loss, gradient), (wanted_loss, wanted) in zip(results(policy, name), results(plain, name), strict=True):
        assert loss == wanted_loss and torch.equal(gradient, wanted) and wanted.norm() > 0.1


@pytest.mark.slow
def test_compiled_steps_are_the_same_bit_for_bit_from_the_same_graphs(tiny_base):
    torch._dynamo.reset()
    counters.clear()
    for name, graphs in (("sft, packed", 1), ("dpo, packed", 3)):  # with lists of keys: policy and reference pass
        found = []
        for offload in (False, True):
            policy = helpers.make_policy(tiny_base, **COMPILED, offload=offload)
            execution = WithFallback(policy, growing(name)[0], "compiled", pytest.fail)
            found.append(results(policy, name, execution=execution))
            assert counters["stats"]["unique_graphs"] == graphs
        for (loss, gradient), (wanted_loss, wanted) in zip(*found, strict=True):
            assert loss == wanted_loss and torch.equal(gradient, wanted)


@pytest.mark.parametrize(
    ("offload", "compiled"),
    [(False, False), (True, False), (True, True), pytest.param(False, True, marks=pytest.mark.slow)],
)
def test_no_input_of_a_recomputed_layer_outlives_the_forward_pass(tiny_base, offload, compiled):
    """Offloaded; and none the backward pass, though compiled layers ask for the gradient of the first one, too."""
    method, examples = METHODS["sft, packed"]
    policy = helpers.make_policy(tiny_base, **COMPILED, offload=offload)
    policy.layers.use(compiled=compiled)
    inputs = []
    for layer in policy.layers.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
    batch = method.micro_batches(examples)[0]
    policy.dropout.set_micro_batch(batch.dropout_keys, 1)
    sums = method.loss(policy, batch)
    assert [reference() is None for reference in inputs] == [offload, offload]
    sums.loss.backward()
    assert [reference() is None for reference in inputs] == [True, True]


def count_layers(monkeypatch):
    """The numbers of the layers whose input is kept on the host from now on, one by one."""
    kept, keeping = [], HostInputs.keeping
    monkeypatch.setattr(HostInputs, "keeping", lambda self, number: kept.append(number) or keeping(self, number))
    return kept


def test_a_pass_without_gradient_keeps_nothing(tiny_base, monkeypatch):
    kept = count_layers(monkeypatch)
    policy = helpers.make_policy(tiny_base, checkpointing=True, recomputed=1, offload=True)
    batch = helpers.sft(2).micro_batches(helpers.ragged_examples(2))[0]
    with policy.reference():
        policy.token_logps(batch)
    assert kept == []
    policy.token_logps(batch)
    assert kept == [0]


def chain(host, x):
    """Three checkpointed products; the input of each goes to the host."""
    for number in range(3):
        with host.keeping(number):
            x = checkpoint(lambda y: torch.sin(y) * y, x, use_reentrant=False, preserve_rng_state=False)
    return x


def plain_gradient(x):
    y = x
    for _ in range(3):
        y = torch.sin(y) * y
    return torch.autograd.grad(y.sum(), x)[0]


def test_a_buffer_stays_where_it_is_until_a_larger_input_comes():
    host = HostInputs(torch.device("cpu"))
    seen = []
    for size in (4, 4, 3, 5, 4):
        x = torch.randn(2, size, 8, requires_grad=True)
        assert torch.equal(torch.autograd.grad(chain(host, x).sum(), x)[0], plain_gradient(x))
        seen.append([host._buffers[number].data_ptr() for number in range(3)])
    assert seen[0] == seen[1] == seen[2] and seen[3] == seen[4]
    assert [buffer.data_ptr() for buffer in host._outgrown] == seen[0]  # a captured graph may still use them


def test_a_later_forward_pass_is_not_taken_for_the_earlier_one():
    host = HostInputs(torch.device("cpu"))
    x = torch.randn(2, 3, 4, requires_grad=True)
    first, second = chain(host, x), chain(host, 2 * x)
    with pytest.raises(RuntimeError, match="layer 2: a later forward pass overwrote its input on the host"):
        first.sum().backward()
    second.sum().backward()


def test_a_backward_pass_that_ended_early_is_forgotten():
    host = HostInputs(torch.device("cpu"))
    x = torch.randn(2, 3, 4, requires_grad=True)
    with host.keeping(0):
        middle = checkpoint(torch.sin, x, use_reentrant=False, preserve_rng_state=False)
    with host.keeping(1):
        end = checkpoint(torch.sin, middle, use_reentrant=False, preserve_rng_state=False)
    once, twice = (torch.autograd.grad(end.sum(), middle, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)  # layer 1's input anew, not what came ahead
    assert host._ahead[0].number == 0  # which is never asked for
    y = torch.randn(2, 3, 4, requires_grad=True)
    end = chain(host, y)
    assert host._ahead is None
    assert torch.equal(torch.autograd.grad(end.sum(), y)[0], plain_gradient(y))


def test_the_empty_tensor_that_torch_2_11_saves_beside_the_input_passes_through():
    host = HostInputs(torch.device("cpu"))
    x = torch.randn(2, 3, requires_grad=True)
    with host.keeping(0):
        empty = torch.exp(torch.empty(0, requires_grad=True))
        end = checkpoint(torch.sin, x, use_reentrant=False, preserve_rng_state=False)
    (end.sum() + empty.sum()).backward()
    assert torch.equal(x.grad, torch.cos(x))


def test_a_run_that_offloads_is_the_same_run(tmp_path, monkeypatch):
    kept = count_layers(monkeypatch)
    space = make_workspace(tmp_path)
    logged = []
    for name, offload in (("plain", False), ("offloaded", True)):
        assert kept == []
        said = run("sft", space.write(name, "sft", train={"offload_activations": offload}))
        assert said.code == 0, said.err
        logged.append([(r["loss"], r["grad_norm"]) for r in metrics(space.folder / name) if "loss" in r])
    assert logged[0] == logged[1] and logged[0] and kept
    assert run("verify", space.folder / "offloaded").code == 0
