"""fp16 means fp16: a T4 has no bfloat16, so none may appear in a step; and weights and gradients stay fp32."""

import bitsandbytes as bnb
import helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowlevel.config.schema import ModelConfig, TrainConfig
from lowlevel.loop import evaluate_examples
from lowlevel.model.base import load_base
from lowlevel.model.placement import Placement
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer

FP16 = Placement(torch.device("cpu"), "fp16")


class Dtypes(TorchDispatchMode):
    """Every dtype that an operator reads or writes, with the operators that touched it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            dtype = leaf.dtype if isinstance(leaf, torch.Tensor) else leaf
            if isinstance(dtype, torch.dtype):
                self.seen.setdefault(dtype, set()).add(str(func))
        return out


def methods():
    yield helpers.sft(4, packing=True), helpers.ragged_examples()
    yield helpers.sft(4), helpers.ragged_examples()
    yield helpers.dpo(4, packing=True, disable_dropout=False), helpers.ragged_pairs()
    yield helpers.dpo(4), helpers.ragged_pairs()


@pytest.mark.parametrize("quantised", [False, True], ids=["unquantised", "nf4"])
def test_no_bfloat16_in_an_fp16_step(tiny_base, parent_adapter, quantised):
    with Dtypes() as dtypes:  # loading, attaching, training and evaluation
        policy = helpers.make_policy(
            tiny_base, quantised=quantised, dropout=0.1, checkpointing=True, parent=parent_adapter, placement=FP16
        )
        optimizer = build_optimizer(policy.flat.weights, TrainConfig(learning_rate=1e-3))
        for method, examples in methods():
            result = helpers.step(policy, method, examples, optimizer, scale=LossScale(), max_grad_norm=1.0)
            assert 0 < result.grad_norm < 100
            evaluate_examples(policy, method, method.micro_batches(examples), prefix="eval_")
    assert torch.bfloat16 not in dtypes.seen, sorted(dtypes.seen[torch.bfloat16])
    assert any("mm" in name for name in dtypes.seen[torch.float16]), "the products ran in fp16, so autocast was on"
    assert not any("mm" in name for name in dtypes.seen.get(torch.float64, ()))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_no_bfloat16_in_an_fp16_step_on_a_base_that_is_stored_in_it(tiny_base, tmp_path, storage):
    base = helpers.write_stored_base(tiny_base, tmp_path / "stored", bnb_4bit_quant_storage=storage)
    policy = helpers.make_policy(base, quantised=True, dropout=0.1, checkpointing=True, placement=FP16)
    states = [m.weight.quant_state for m in policy.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {state.dtype for state in states} == {torch.float16}
    assert {t.dtype for s in states for t in (s.code, s.state2.code, s.state2.absmax, s.offset)} == {torch.float32}
    held = {t.dtype for t in (*policy.model.parameters(), *policy.model.buffers())}
    assert torch.bfloat16 not in held and {torch.float16, torch.uint8} < held
    with Dtypes() as dtypes:
        for method, examples in methods():
            assert 0 < helpers.step(policy, method, examples, scale=LossScale()).grad_norm < 100
    assert torch.bfloat16 not in dtypes.seen, sorted(dtypes.seen[torch.bfloat16])


def test_the_watch_sees_bfloat16(tiny_base):
    policy = helpers.make_policy(tiny_base, placement=Placement(torch.device("cpu"), "bf16"))
    with Dtypes() as dtypes:
        helpers.step(policy, helpers.sft(), helpers.ragged_examples())
    assert torch.bfloat16 in dtypes.seen and torch.float16 not in dtypes.seen


@pytest.mark.parametrize("quantised", [False, True], ids=["unquantised", "nf4"])
def test_weights_gradients_and_logps_are_fp32_under_autocast(tiny_base, parent_adapter, quantised):
    policy = helpers.make_policy(tiny_base, quantised=quantised, parent=parent_adapter, placement=FP16)
    method = helpers.dpo()
    (batch,) = method.micro_batches(helpers.ragged_pairs())
    sums = method.loss(policy, batch)
    sums.loss.backward()
    assert sums.loss.dtype == torch.float32 and {m.dtype for m in sums.metrics.values()} == {torch.float32}
    assert policy.flat.weights.dtype == policy.flat.grad.dtype == torch.float32
    for name, parameter in policy.model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32, name
        elif parameter.is_floating_point():
            assert parameter.dtype == torch.float16, name
    assert all(view.grad.dtype == torch.float32 for view in policy.flat.views.values())


def test_fp16_gradients_are_near_those_of_fp32(tiny_base):
    """And without loss scaling they are not: what a small gradient loses in fp16, the scale keeps."""
    examples = helpers.ragged_examples()
    _, expected = helpers.loss_and_gradient(helpers.make_policy(tiny_base), helpers.sft(), examples)
    policy = helpers.make_policy(tiny_base, placement=FP16)
    _, scaled = helpers.loss_and_gradient(policy, helpers.sft(), examples, scale=LossScale(scale=2.0**10))
    assert max(helpers.drifts(scaled, expected)) < 1e-2
    tiny = LossScale(scale=2.0**-14)  # as a loss divided by many tokens would be
    _, lost = helpers.loss_and_gradient(policy, helpers.sft(), examples, scale=tiny)
    assert max(helpers.drifts(lost, expected)) > 5e-2


def test_eval_mode_on_a_cpu_with_bf16_instructions_computes_in_fp32(tiny_base, monkeypatch):
    """bitsandbytes 0.50 would repack 4-bit weights for bf16 products there, in eval mode alone."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = load_base(ModelConfig(name=str(tiny_base)), helpers.CPU)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
