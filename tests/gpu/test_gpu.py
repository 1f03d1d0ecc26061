"""What only a GPU can show. Run on one with `pytest tests/gpu`; elsewhere these tests say why they did not run."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small import CUDA, attention_errors, fill_lora_b, ragged, small_policy
from torch.utils._python_dispatch import TorchDispatchMode

from lowlevel.batch.layout import Shape
from lowlevel.config.offline import DPOConfig, RewardConfig, SFTConfig
from lowlevel.config.schema import TrainConfig
from lowlevel.execution import Eager, ExecutionFailedError, WithFallback, signature_of
from lowlevel.hashing import key32
from lowlevel.loop import optimizer_step
from lowlevel.losses import token_logps, token_logps_reference
from lowlevel.losses.registry import loss as custom_loss
from lowlevel.methods.dpo import DPO
from lowlevel.methods.reward import Reward
from lowlevel.methods.sft import SFT
from lowlevel.model.base import base_sha256
from lowlevel.model.flat import flatten
from lowlevel.model.moving_reference import Following
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def policy(model_dir, precision, attention="sdpa", **options):
    return small_policy(model_dir, precision, attention=attention, **options)


def one_step(policy, method, rows, *, precision="fp16", step=0):
    optimizer = build_optimizer(policy.flat.weights, TrainConfig(optim="adamw", learning_rate=1e-3))
    batches = [batch.to(CUDA) for batch in method.micro_batches(rows)]
    execution, scale = Eager(policy, method), LossScale.for_precision(precision)
    result = optimizer_step(execution, optimizer, batches, scale, seed=1, step=step, max_grad_norm=1e9)
    return result, policy.flat.grad.clone()


SHAPE = Shape(positions=32, examples=8, longest=256, capacity=512)
PADDED = Shape(positions=2048, examples=8, longest=256, capacity=2048)  # as a rehearsal's: padding exceeds any example
METHODS = {
    "sft": (SFT(SFTConfig(), 2, 256, True), False),
    "dpo": (DPO(DPOConfig(disable_dropout=False), 2, 256, True), True),
    "reward": (Reward(RewardConfig(disable_dropout=False), 2, 256, True), True),
}


@pytest.mark.parametrize("name", METHODS)
def test_fp16_step_equals_fp32_step(model_dir, name):
    method, pairs = METHODS[name]
    own = {"quantised": False, "reward_head": name == "reward"}
    reference, exact = one_step(policy(model_dir, "fp32", **own), method, ragged(pairs), precision="fp32")
    result, grad = one_step(policy(model_dir, "fp16", **own), method, ragged(pairs))
    assert result.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=2e-3)
    error = (grad - exact).norm() / exact.norm()
    assert error < 5e-3, f"relative error of the fp16 gradient {error:.2e}"


@pytest.mark.parametrize("name", METHODS)
def test_layout_and_checkpointing_do_not_change_the_step(model_dir, name):
    method, pairs = METHODS[name]
    padded = copy.copy(method)
    object.__setattr__(padded, "packing", False)
    head = {"reward_head": name == "reward"}
    _, packed_grad = one_step(policy(model_dir, "fp32", **head), method, ragged(pairs), precision="fp32")
    for other, kwargs in (
        (padded, {}),
        (method, {"gradient_checkpointing": False}),
        (padded, {"attention": "lowlevel_efficient"}),
        (method, {"attention": "lowlevel_efficient"}),
        (method, {"attention": "lowlevel_math"}),
    ):
        _, grad = one_step(policy(model_dir, "fp32", **kwargs, **head), other, ragged(pairs), precision="fp32")
        assert (grad - packed_grad).norm() / packed_grad.norm() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "lowlevel_efficient", "lowlevel_fa2"])
@pytest.mark.parametrize("packing", [True, False])
def test_reference_equals_policy_at_step_0_bit_for_bit(model_dir, packing, attention):
    method = DPO(DPOConfig(), 2, 256, packing, SHAPE)
    one = policy(model_dir, "fp16", attention=attention)
    before = base_sha256(one.model)
    result, _ = one_step(one, method, ragged(True))
    assert result.metrics["loss"] == np.float32(np.log(2))
    assert result.metrics["rewards/margins"] == 0.0 and result.metrics["rewards/accuracies"] == 0.5
    assert base_sha256(one.model) == before


class NoBfloat16(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in (*args, *(out if isinstance(out, tuple) else (out,))):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16), func
        return out


@pytest.fixture(scope="module")
def stored_in_bf16(model_dir, tmp_path_factory):
    """As people publish pre-quantised bases: fp4 without double quantisation, everything else in bfloat16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    folder = tmp_path_factory.mktemp("stored")
    settings = {"dtype": torch.bfloat16, "quantization_config": quantisation, "device_map": {"": 0}}
    AutoModelForCausalLM.from_pretrained(model_dir, **settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", METHODS)
def test_no_bf16_tensor_in_an_fp16_step(model_dir, name):
    method, pairs = METHODS[name]
    one = policy(model_dir, "fp16", reward_head=name == "reward")
    with NoBfloat16():
        _, grad = one_step(one, method, ragged(pairs))
    assert grad.dtype == one.flat.weights.dtype == torch.float32


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_optimizer_state_is_paged_also_after_restoring(optim, ratio):
    views = {f"{name}.weight": torch.nn.Parameter(torch.randn(500_003, device=CUDA)) for name in (".lora_A", ".lora_B")}
    flat = flatten(views, ratio)
    config = TrainConfig(optim=optim)
    optimizer = build_optimizer(flat.weights, config, flat.parts)
    for _ in range(3):
        flat.grad.normal_()
        optimizer.step()
    saved = optimizer_tensors(optimizer)
    again = build_optimizer(flat.weights, config, flat.parts)
    load_optimizer_tensors(again, saved)
    states = [again.state[part] for part, _ in flat.parts]
    assert all(state["state1"].is_paged and state["state2"].is_paged for state in states)
    restored = optimizer_tensors(again)
    assert saved.keys() == restored.keys() and all(torch.equal(saved[k], restored[k]) for k in saved)


def test_paged_adamw_equals_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 300_007, device=CUDA)) for _ in range(2))
    config = TrainConfig(learning_rate=1e-3)
    paged, plain = build_optimizer(ours, config), torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for _ in range(10):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        paged.step()
        plain.step()
    torch.cuda.synchronize()
    assert (ours - theirs).abs().max() < 1e-6


def test_token_logps_fp16_against_the_twin():
    torch.manual_seed(0)
    hidden = torch.randn(777, 256, device=CUDA, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(1003, 256, device=CUDA, dtype=torch.float16) / 16
    targets = torch.randint(0, 1003, (777,), device=CUDA)
    upstream = torch.full((777,), 65536.0 / 777, device=CUDA)
    results = []
    for function in (token_logps, token_logps_reference):
        logps = function(hidden, weight, targets)
        (grad,) = torch.autograd.grad(logps, hidden, upstream)
        results.append((logps.detach(), grad.float()))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-4)
    assert (results[0][1] - results[1][1]).norm() / results[1][1].norm() < 2e-3


@pytest.mark.parametrize("shape", [SHAPE, PADDED])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("kernel", "dtype", "bound"), [
    ("flash", torch.float16, 4e-3), ("efficient", torch.float16, 4e-3), ("efficient", torch.float32, 2e-5),
])  # fmt: skip
def test_span_attention_kernels_equal_their_twin(kernel, dtype, bound, groups, shape):
    method = DPO(DPOConfig(), 4, 256, True, shape)
    batch = method.micro_batches(ragged(True))[0].to(CUDA)
    longest = max(int(part.diff().max()) for part in (batch.span_queries, batch.span_keys))
    assert longest == batch.longest if shape is PADDED else longest <= batch.longest
    assert max(attention_errors(batch, groups, kernel, dtype)) < bound


def steps(one, method, rows, execution, *, scale, count):
    """Flat gradients and losses of `count` steps, nothing updated between them."""
    found = []
    for step in range(count):
        one.flat.grad.zero_()
        batches = [batch.to(CUDA) for batch in method.micro_batches(rows)]
        sums = [execution.run(batch, scale, key32(1, step)).named() for batch in batches]
        found.append((sum(float(s["loss"]) for s in sums), one.flat.grad.clone()))
    return found


def modes_agree(one, method, rows, *, scale, bound):
    """Losses and gradients of compiled and graphed steps are within `bound` of the eager ones, relative."""
    fill_lora_b(one, 0.02)
    expected = steps(one, method, rows, Eager(one, method), scale=scale, count=4)
    for mode in ("compiled", "graphed"):
        execution = WithFallback(one, method, mode, pytest.fail)
        found = steps(one, method, rows, execution, scale=scale, count=4)
        for (loss, grad), (wanted_loss, wanted) in zip(found, expected, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=bound)
            error = (grad - wanted).norm() / wanted.norm()
            assert error < bound, f"{mode}: {error:.2e}"
        if mode == "graphed":
            signatures = {signature_of(batch.to(CUDA)) for batch in method.micro_batches(rows)}
            assert set(execution.execution.captured) == signatures
        one.layers.use(compiled=False)
    assert not torch.equal(expected[0][1], expected[1][1])  # the step's dropout key reached the graph


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("precision", "attention", "bound"), [
    ("fp32", "lowlevel_efficient", 1e-5), ("fp16", "lowlevel_efficient", 2e-3), ("fp16", "lowlevel_fa2", 2e-3),
])  # fmt: skip
@pytest.mark.parametrize("name", METHODS)
def test_compiled_and_graphed_steps_equal_eager_ones(model_dir, name, precision, attention, bound, checkpointing):
    method, rows = shaped(name)
    own = {"gradient_checkpointing": checkpointing, "reward_head": name == "reward"}
    one = policy(model_dir, precision, attention=attention, **own)
    modes_agree(one, method, rows, scale=1024.0 if precision == "fp16" else 1.0, bound=bound)


@pytest.mark.parametrize("attention", ["lowlevel_efficient", "lowlevel_fa2"])
@pytest.mark.parametrize("name", METHODS)
def test_an_fp16_step_on_a_base_that_is_stored_in_bf16(stored_in_bf16, name, attention):
    """No bf16 is held or computed with, and eager = compiled = graphed as on other bases."""
    method, rows = shaped(name)
    own = {"attention": attention, "reward_head": name == "reward"}
    one = policy(stored_in_bf16, "fp16", **own)
    assert not any(tensor.dtype == torch.bfloat16 for tensor in (*one.model.parameters(), *one.model.buffers()))
    with NoBfloat16():
        one_step(one, method, rows)
    modes_agree(policy(stored_in_bf16, "fp16", **own), method, rows, scale=1024.0, bound=2e-3)


def shaped(name):
    method, pairs = METHODS[name]
    method = copy.copy(method)
    object.__setattr__(method, "shape", SHAPE)
    return method, ragged(pairs)


@custom_loss
def focal_margin(pairs, *, beta, gamma=2.0):
    """A custom loss of every kind of input: pair sums, and token log-probabilities summed by completion."""
    x = beta * pairs.deltas
    confidence = torch.zeros(2 * len(x) + 1, device=x.device).index_add(0, pairs.sequence_ids, pairs.token_logps.exp())
    shares = confidence[: len(x)] / pairs.chosen_lengths.clamp(min=1)
    return -torch.nn.functional.logsigmoid(x) * torch.sigmoid(-x) ** gamma - 0.1 * shares, {"shares": shares}


def test_a_custom_loss_is_captured_and_equals_eager(model_dir):
    config = DPOConfig(loss_type="focal_margin", loss_kwargs={"gamma": 1.5}, disable_dropout=False)
    method, rows = DPO(config, 2, 256, True, SHAPE), ragged(pairs=True)
    one = policy(model_dir, "fp16", attention="lowlevel_efficient")
    expected = steps(one, method, rows, Eager(one, method), scale=1024.0, count=3)
    execution = WithFallback(one, method, "graphed", pytest.fail)
    found = steps(one, method, rows, execution, scale=1024.0, count=3)
    assert execution.execution.captured
    for (loss_sum, grad), (wanted_loss, wanted) in zip(found, expected, strict=True):
        assert loss_sum == pytest.approx(wanted_loss, rel=2e-3)
        assert (grad - wanted).norm() / wanted.norm() < 2e-3


@pytest.mark.parametrize("mode", ["compiled", "graphed"])
def test_a_moving_reference_is_read_by_captured_graphs_where_it_moves(model_dir, mode):
    """A copy of the policy after each step: every step starts at log 2, also in a graph captured before the moves."""
    method, rows = DPO(DPOConfig(), 2, 256, True, SHAPE), ragged(pairs=True)
    one = policy(model_dir, "fp16", attention="lowlevel_efficient", following=Following(1, 1.0))
    optimizer = build_optimizer(one.flat.weights, TrainConfig(learning_rate=1e-3))
    execution = WithFallback(one, method, mode, pytest.fail)
    references = set()
    for step in range(5):
        batches, scale = method.micro_batches(rows), LossScale.for_precision("fp16")
        result = optimizer_step(execution, optimizer, batches, scale, seed=1, step=step, max_grad_norm=1.0)
        assert result.metrics["rewards/margins"] == 0 and result.loss == pytest.approx(np.log(2), rel=1e-6)
        references.add(result.metrics["logps/ref_chosen"])
        one.move_reference(step + 1)
    assert len(references) == 5


SMOOTHED = SFTConfig(loss_type="smoothed_cross_entropy", z_loss_weight=1e-3)
OF_STATISTICS = {
    "smoothed with z-loss": SFT(SMOOTHED, 2, 256, True, SHAPE),
    "weighted": SFT(SMOOTHED, 2, 256, True, SHAPE),
    "dft": SFT(SFTConfig(loss_type="dft"), 2, 256, True, SHAPE),
    "wpo": DPO(DPOConfig(loss_type="wpo", disable_dropout=False), 2, 256, True, SHAPE),
}


@pytest.mark.parametrize("name", OF_STATISTICS)
def test_losses_with_statistics_and_weights_compiled_and_graphed(model_dir, name):
    method, rows = OF_STATISTICS[name], ragged(pairs=name == "wpo")
    if name == "weighted":
        for row in rows:
            row.weights = np.linspace(0.1, 3, len(row.labels)).astype(np.float32)
    modes_agree(policy(model_dir, "fp16", attention="lowlevel_efficient"), method, rows, scale=1024.0, bound=3e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_fewer_examples_is_captured_too(model_dir, name):
    """The last step of an epoch may have fewer rows: other numbers of spans and sequences."""
    method, rows = shaped(name)
    one = policy(model_dir, "fp16", attention="lowlevel_fa2", reward_head=name == "reward")
    execution = WithFallback(one, method, "graphed", pytest.fail)
    for count in (8, 8, 3, 3, 1, 1, 8):
        expected = steps(one, method, rows[:count], Eager(one, method), scale=1024.0, count=1)[0]
        found = steps(one, method, rows[:count], execution, scale=1024.0, count=1)[0]
        assert found[0] == pytest.approx(expected[0], rel=2e-3)
        assert (found[1] - expected[1]).norm() / expected[1].norm() < 2e-3
    assert execution.mode == "graphed"


def test_a_shape_that_cannot_be_captured_at_once_runs_uncaptured_once(model_dir, monkeypatch):
    method, rows = shaped("sft")
    one = policy(model_dir, "fp16", attention="lowlevel_fa2")
    execution = WithFallback(one, method, "graphed", pytest.fail)
    steps(one, method, rows, execution, scale=1024.0, count=2)
    capture, failures = execution.execution._capture, []

    def fail_once(batch):
        if not failures:
            failures.append(batch)
            raise RuntimeError("compiles anew")
        return capture(batch)

    monkeypatch.setattr(execution.execution, "_capture", fail_once)
    expected = steps(one, method, rows[:2], Eager(one, method), scale=1024.0, count=3)
    with pytest.raises(ExecutionFailedError, match="runs uncaptured once"):
        steps(one, method, rows[:2], execution, scale=1024.0, count=1)
    found = steps(one, method, rows[:2], execution, scale=1024.0, count=3)
    assert failures and execution.mode == "graphed"
    for (loss, grad), (wanted_loss, wanted) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-3) and (grad - wanted).norm() / wanted.norm() < 2e-3


@pytest.mark.parametrize("mode", ["compiled", "graphed"])
def test_a_fresh_adapter_equals_its_reference_bit_for_bit_compiled_too(model_dir, mode):
    method, rows = shaped("dpo")
    method = DPO(DPOConfig(), 2, 256, True, method.shape)  # dropout off
    one = policy(model_dir, "fp16", attention="lowlevel_fa2")
    execution = WithFallback(one, method, mode, pytest.fail)
    for _ in range(2):
        one.flat.grad.zero_()
        for batch in method.micro_batches(rows):
            numbers = execution.run(batch.to(CUDA), 1.0, key32(1, 0)).examples
            for side in ("chosen", "rejected"):
                assert torch.equal(numbers[f"logps/{side}"], numbers[f"logps/ref_{side}"])
