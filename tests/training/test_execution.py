"""Spans against the mask, batches of fixed shape against plain ones, and compiled layers against eager ones."""

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from lowlevel import execution
from lowlevel.batch.layout import Shape, attention_mask, build_batch
from lowlevel.batch.segments import pair_segments, sft_segment
from lowlevel.config.data import DataConfig
from lowlevel.config.file import config_from_tables
from lowlevel.config.offline import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from lowlevel.config.schema import RunConfig
from lowlevel.data.examples import PreferenceExample
from lowlevel.execution import MODES, Eager, Graphed, WithFallback, signature_of
from lowlevel.hashing import key32
from lowlevel.kernels.attention import _by_query, list_keys, span_attention
from lowlevel.loop import evaluate_examples
from lowlevel.losses import LOSSES
from lowlevel.methods.choice import build_method
from lowlevel.methods.dpo import DPO
from lowlevel.methods.kto import KTO
from lowlevel.methods.reward import Reward
from lowlevel.methods.sft import SFT
from lowlevel.model.attention_choice import MASKED, NAMES, Attention
from lowlevel.running.job import evaluation_batches
from lowlevel.running.rehearsal import largest_batch, rehearse

SHAPE = Shape(positions=16, examples=4, longest=64, capacity=96)
SPANS = "lowlevel_math"


def methods(shape=None):
    return {
        "sft": (SFT(SFTConfig(), 2, 48, True, shape), helpers.ragged_examples()),
        "dpo": (DPO(DPOConfig(disable_dropout=False), 2, 64, True, shape), helpers.ragged_pairs()),
        "kto": (KTO(KTOConfig(disable_dropout=False), 2, 48, True, shape), helpers.labelled_examples()),
        "reward": (Reward(RewardConfig(disable_dropout=False), 2, 64, True, shape), helpers.ragged_pairs()),
        "sft, a row each": (SFT(SFTConfig(), 2, 48, False, shape), helpers.ragged_examples()),
        "dpo, a row each": (DPO(DPOConfig(disable_dropout=False), 2, 64, False, shape), helpers.ragged_pairs()),
    }


def mask_from_spans(batch):
    """The mask that the spans stand for, (M, M), built one query at a time."""
    positions = batch.input_ids.numel()
    index = torch.arange(positions) if batch.key_index is None else batch.key_index
    mask = torch.zeros(positions, positions, dtype=torch.bool)
    queries, keys = batch.span_queries.tolist(), batch.span_keys.tolist()
    for g in range(len(queries) - 1):
        count, listed = queries[g + 1] - queries[g], index[keys[g] : keys[g + 1]]
        for i in range(count):
            mask[queries[g] + i, listed[: len(listed) - count + i + 1]] = True
    return mask


@pytest.mark.parametrize("shape", [None, SHAPE])
@pytest.mark.parametrize("name", methods())
def test_spans_are_the_mask(name, shape):
    method, examples = methods(shape)[name]
    for batch in method.micro_batches(examples):
        rows, width = batch.input_ids.shape
        expected = torch.block_diag(*attention_mask(batch)[:, 0].int()).bool()
        found = mask_from_spans(batch)
        tokens = batch.segment_ids.flatten() >= 0
        assert torch.equal(found[tokens], expected[tokens])
        assert not found[:, ~tokens][tokens].any()  # no token sees padding
        assert found.any(1).all() and batch.span_queries[-1] == rows * width  # every position has something to see
        spans = batch.span_queries.diff().max(), batch.span_keys.diff().max()
        assert max(spans) <= batch.longest


FILLED = {  # of batches whose padding can be longer than any example
    "many short rows": ({"max_length": 64}, {"per_device_train_batch_size": 32}),
    "no packing": ({"max_length": 100, "packing": False}, {"per_device_train_batch_size": 8}),
    "a budget's micro-batch": ({"max_length": 64}, {"micro_batch_positions": 8192}),
}


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("name", FILLED)
def test_no_span_is_longer_than_its_bound(name, method):
    """A kernel that is told less than a span's length leaves numbers unwritten, or never ends."""
    data, train = FILLED[name]
    config = config_from_tables({"method": method, "data": data, "train": train}, "test")
    built = build_method(config, Attention(NAMES["math"], "as on a GPU"))
    longest = data["max_length"]
    made = helpers.ragged_examples(60, longest=longest) if method == "sft" else None
    examples = made or helpers.ragged_pairs(60, longest=longest // 2)
    steps = [examples[start : start + config.rows_per_step] for start in range(0, 60, config.rows_per_step)]
    batches = [batch for step in steps for batch in built.micro_batches(step)]
    batches.append(largest_batch(built, examples, config.rows_per_step))
    for batch in batches:
        spans = max(batch.span_queries.diff().max(), batch.span_keys.diff().max())
        assert spans <= batch.longest, f"a span of {spans}, told {batch.longest}"
        assert batch.span_queries[-1] == batch.input_ids.numel()


def test_key_uses_say_where_each_position_is_listed():
    batch = methods()["dpo"][0].micro_batches(helpers.ragged_pairs())[0]
    listed = [[] for _ in range(batch.input_ids.numel())]
    for place, position in enumerate(batch.key_index.tolist()):
        listed[position].append(place)
    nowhere = len(batch.key_index)
    assert max(map(len, listed)) == 2
    for position, places in enumerate(listed):
        assert sorted(p for p in batch.key_uses[:, position].tolist() if p != nowhere) == places


def random_attention(seed=0, groups=2):
    generator = torch.Generator().manual_seed(seed)
    batch = methods()["dpo"][0].micro_batches(helpers.ragged_pairs())[0]
    positions = batch.input_ids.numel()
    shapes = (positions, 2 * groups, 8), (positions, 2, 8), (positions, 2, 8)
    return batch, [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("groups", [1, 2])
def test_span_attention_equals_attention_with_the_mask_forward_and_gradient(groups):
    batch, (query, key, value) = random_attention(groups=groups)
    listed = [list_keys(part, batch.key_index, batch.key_uses) for part in (key, value)]
    output = span_attention(query, *listed, batch.span_queries, batch.span_keys, batch.longest, 0.3, "math")
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(groups, 1)) * 0.3
    scores = scores.masked_fill(~mask_from_spans(batch), float("-inf"))
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(groups, 1))
    assert torch.allclose(output, expected, rtol=0, atol=1e-13)
    direction = torch.randn_like(output)
    grads = torch.autograd.grad(output, (query, key, value), direction)
    for found, wanted in zip(grads, torch.autograd.grad(expected, (query, key, value), direction), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_the_operator_obeys_torchs_rules_for_custom_operators():
    batch, (query, key, value) = random_attention()
    listed = [list_keys(part, batch.key_index, batch.key_uses).detach().requires_grad_() for part in (key, value)]
    arguments = (query, *listed, batch.span_queries, batch.span_keys, batch.longest, 0.3, "math")
    torch.library.opcheck(torch.ops.lowlevel.span_attention.default, arguments)


def gradient(policy, method, examples, *, dropout_seed=1):
    """Loss, metrics and flat gradient of one step, summed over its micro-batches."""
    policy.flat.grad.zero_()
    execution = Eager(policy, method)
    sums = [execution.run(batch, 1.0, key32(dropout_seed, 0)).named() for batch in method.micro_batches(examples)]
    return {name: sum(float(one[name]) for one in sums) for name in sums[0]}, policy.flat.grad.clone()


@pytest.mark.parametrize("name", methods())
def test_spans_and_fixed_shapes_give_the_same_step(tiny_base, name):
    method, examples = methods()[name]
    own = {"dropout": 0.3, "reward_head": name == "reward"}
    expected, wanted = gradient(helpers.make_policy(tiny_base, **own), method, examples)
    policy = helpers.make_policy(tiny_base, **own, attention=SPANS)
    for shape in (None, SHAPE):
        method, examples = methods(shape)[name]
        found, grad = gradient(policy, method, examples)
        for metric, value in expected.items():
            assert found[metric] == pytest.approx(value, rel=1e-5, abs=1e-5), (metric, shape)
        assert (grad - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "rpo"])
def test_examples_that_fill_a_shape_reach_no_sum(tiny_base, loss_type):
    policy = helpers.make_policy(tiny_base)
    pairs = helpers.ragged_pairs(3)
    results = []
    for shape in (None, SHAPE):
        method = DPO(DPOConfig(loss_type=loss_type), 4, 64, True, shape)
        results.append(gradient(policy, method, pairs))
    (expected, wanted), (found, grad) = results
    assert found == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(grad).all() and (grad - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("loss_type", LOSSES)
def test_build_method_fills_up_no_batch_of_a_loss_that_mixes_pairs(loss_type):
    data = DataConfig(format="preference")
    config = RunConfig(method="dpo", data=data, dpo=DPOConfig(loss_type=loss_type))
    shape = build_method(config, Attention(NAMES["math"], "")).shape
    batch = DPO(config.dpo, 2, 64, True, replace(shape, longest=64)).micro_batches(helpers.ragged_pairs(3))[0]
    assert batch.real.all() == LOSSES[loss_type].mixes_pairs
    assert build_method(config, MASKED).shape is None


def test_a_fixed_shape_is_the_same_for_batches_of_about_the_same_size():
    method = SFT(SFTConfig(), 2, 48, True, SHAPE)
    batches = [b for seed in range(12) for b in method.micro_batches(helpers.ragged_examples(seed=seed))]
    assert len({signature_of(batch) for batch in batches}) < len(batches) / 2
    for batch in batches:
        assert batch.input_ids.shape[1] % SHAPE.positions == 0
        positions = batch.input_ids.numel()
        assert len(batch.scored_positions) == (
            positions if batch.num_scored > positions * 3 // 4 else positions * 3 // 4
        )
        assert batch.scored_positions.unique().numel() == len(batch.scored_positions)


def test_changing_one_example_leaves_the_others_bit_equal(tiny_base):
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    method, examples = methods(SHAPE)["sft"]
    changed = copy.deepcopy(examples)
    changed[0].input_ids[1:] = 3 + (changed[0].input_ids[1:] + 1) % 20
    results = []
    for rows in (examples, changed):
        logps = {}
        for batch in SFT(SFTConfig(), 8, 48, True, SHAPE).micro_batches(rows):
            hidden = policy.scored_hidden_states(batch).detach()
            for number, row in enumerate(batch.data_rows):
                index = batch.sequence_index[number]
                logps[row] = hidden[index[index < len(hidden)]]
        results.append(logps)
    first = examples[0].row
    assert not torch.equal(results[0][first], results[1][first])
    assert all(torch.equal(results[0][row], results[1][row]) for row in results[0] if row != first)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name",
    ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "reward"))],  # the same layers
)
def test_compiled_layers_give_the_same_step_from_one_graph_a_mode(tiny_base, monkeypatch, name, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    own = {"checkpointing": checkpointing, "reward_head": name == "reward"}
    policy = helpers.make_policy(tiny_base, dropout=0.3, attention=SPANS, **own)
    method, examples = methods(SHAPE)[name]
    expected, wanted = gradient(policy, method, examples)
    notes = []
    execution = WithFallback(policy, method, "compiled", notes.append)
    assert policy.layers.compiled
    policy.flat.grad.zero_()
    sums = [execution.run(batch, 1.0, key32(1, 0)).named() for batch in method.micro_batches(examples)]
    assert not notes
    assert sum(float(one["loss"]) for one in sums) == pytest.approx(expected["loss"], rel=1e-5)
    assert (policy.flat.grad - wanted).norm() / wanted.norm() < 1e-5
    shapes = {batch.input_ids.shape for batch in method.micro_batches(examples)}
    assert len(shapes) > 1 and len(policy.layers.layers) > 1
    modes = 2 if name == "dpo" else 1  # dpo: the policy's pass and the reference's
    assert counters["stats"]["unique_graphs"] == modes
    assert sum(counters["graph_break"].values()) == 0
    if name == "dpo":  # a loss of the user's with the same formula: the same bits, and nothing compiled again
        compiled = policy.flat.grad.clone()
        policy.flat.grad.zero_()
        own = replace(method, config=method.config.model_copy(update={"loss_type": f"{__name__}:own_sigmoid"}))
        monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(own_sigmoid=own_sigmoid))
        execution = WithFallback(policy, own, "compiled", pytest.fail)
        again = [execution.run(batch, 1.0, key32(1, 0)).named() for batch in own.micro_batches(examples)]
        assert [float(one["loss"]) for one in again] == [float(one["loss"]) for one in sums]
        assert torch.equal(policy.flat.grad, compiled) and counters["stats"]["unique_graphs"] == modes


def own_sigmoid(pairs, *, beta):
    return -torch.nn.functional.logsigmoid(beta * pairs.deltas)


def test_a_mode_that_fails_falls_back_with_one_line(tiny_base):
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    method, examples = methods(SHAPE)["sft"]
    notes = []
    execution = WithFallback(policy, method, "compiled", notes.append)

    class Broken:
        def run(self, *arguments):
            raise RuntimeError("no compiler here\nand a long traceback")

    execution.execution = Broken()
    result = helpers.step(policy, method, examples, execution=execution)
    assert notes == ["execution: compiled failed (no compiler here); continuing eager"]
    assert execution.mode == MODES[0] and not policy.layers.compiled
    expected = helpers.step(helpers.make_policy(tiny_base, attention=SPANS), method, examples)
    assert result.metrics["loss"] == expected.metrics["loss"] and result.grad_norm == expected.grad_norm


def test_an_evaluation_that_cannot_be_compiled_falls_back_too(tiny_base, monkeypatch):
    """It comes before the first step."""

    def no_compiler(forward, **_):
        def broken(*arguments, **named):
            raise RuntimeError("no compiler here")

        return broken

    policy = helpers.make_policy(tiny_base, attention=SPANS)
    method, examples = methods(SHAPE)["sft"]
    batches, notes = method.micro_batches(examples), []
    wanted = evaluate_examples(policy, method, batches, prefix="eval_")
    monkeypatch.setattr(torch, "compile", no_compiler)
    execution = WithFallback(policy, method, "compiled", notes.append)
    with pytest.raises(RuntimeError, match="no compiler here"):
        evaluate_examples(policy, method, batches, prefix="eval_")
    found = execution.until_it_runs(lambda: evaluate_examples(policy, method, batches, prefix="eval_"))
    assert found == wanted and not policy.layers.compiled
    assert notes == ["execution: compiled failed (no compiler here); continuing eager"]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_an_evaluation_takes_larger_micro_batches_for_the_same_numbers(tiny_base, name):
    policy, (method, examples) = helpers.make_policy(tiny_base, attention=SPANS), methods(SHAPE)[name]
    inputs: Any = SimpleNamespace(data=SimpleNamespace(evaluation=4 * examples))
    larger = evaluation_batches(method, RunConfig(method=name), inputs)
    plain = method.micro_batches(inputs.data.evaluation)
    widths = [max(batch.input_ids.numel() for batch in batches) for batches in (plain, larger)]
    assert widths[0] <= SHAPE.capacity < widths[1] <= 4 * SHAPE.capacity and len(larger) < len(plain) / 2
    found, wanted = (evaluate_examples(policy, method, batches, prefix="") for batches in (larger, plain))
    assert found == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in wanted.items()}


def test_a_rehearsal_that_cannot_be_compiled_falls_back_too(tiny_base, monkeypatch):
    """With a GPU's counters in the place of its memory: what memory.json says, and that nothing is left behind."""

    def broken(*arguments, **named):
        raise RuntimeError("no compiler [here]")

    counters_of_a_gpu = {
        "memory_allocated": 10,
        "max_memory_allocated": 30,
        "memory_reserved": 40,
        "mem_get_info": (50, 90),
    }
    for name, value in counters_of_a_gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: broken)
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    method, examples = methods(SHAPE)["dpo"]
    before, notes = policy.flat.weights.clone(), []
    execution = WithFallback(policy, method, "compiled", notes.append)
    optimizer = torch.optim.SGD([policy.flat.weights], lr=0.1)
    report = rehearse(policy, method, execution, optimizer, largest_batch(method, examples, 4))
    assert notes == ["execution: compiled failed (no compiler [here]); continuing eager"]
    assert report["phases"] == {"forward and loss": 30, "backward": 30, "a whole micro-step": 30}
    assert (report["allocated"], report["kept_for_backward"], report["device_used"]) == (10, 0, 40)
    assert report["positions"] and report["components"]["gradient"] == policy.flat.grad.nbytes
    assert torch.equal(policy.flat.weights, before) and not policy.flat.grad.any()


def test_a_failure_of_the_eager_mode_is_an_error(tiny_base):
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    method, examples = methods(SHAPE)["sft"]
    execution = WithFallback(policy, method, "eager", pytest.fail)

    class Broken:
        def run(self, *arguments):
            raise RuntimeError("the model itself is wrong")

    execution.execution = Broken()
    with pytest.raises(RuntimeError, match="the model itself is wrong"):
        execution.run(method.micro_batches(examples)[0], 1.0, key32(1, 0))


def test_rows_of_pairs_need_no_listed_keys():
    prompt = np.arange(5)
    pair = PreferenceExample(0, "", prompt, np.arange(3), np.arange(4))
    rows = [[segment] for segment in pair_segments(pair, 0, shared=False)]
    assert build_batch(rows, pairs=True).key_index is None
    assert build_batch([[sft_segment(0, 0, prompt, prompt)]], pairs=False).key_index is None
    assert build_batch([pair_segments(pair, 0, shared=True)], pairs=True).key_index is not None


def test_a_graph_is_let_go_before_one_too_many_is_captured(monkeypatch):
    graphs = Graphed.__new__(Graphed)
    graphs.captured, graphs._ready, graphs._plain, graphs._failed = {}, {frozenset(["x"])}, set(), set()
    alive = []

    def capture(self, batch, signature):
        alive.append(len(self.captured) + 1)
        return SimpleNamespace(signature=signature)

    monkeypatch.setattr(execution, "MAX_GRAPHS", 3)
    monkeypatch.setattr(execution, "signature_of", lambda batch: batch.signature)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Graphed, "_try_capture", capture)
    monkeypatch.setattr(Graphed, "_replay", lambda self, captured, *arguments: {"loss": captured.signature})
    for number in (0, 1, 2, 0, 3, 0, 4):
        batch = SimpleNamespace(signature=number, tensors=lambda: {"x": None})
        assert graphs.run(batch, 1.0, key32(1, 0)) == {"loss": number}
    assert alive == [1, 2, 3, 3, 3]  # 0 is used between, so it is never the oldest
    assert list(graphs.captured) == [3, 0, 4]


def test_the_logsumexp_of_a_query_is_found_in_its_span():
    """The efficient kernel's, (G, H, longest): the reading of beginnings runs it on GPUs alone."""
    queries = torch.tensor([0, 2, 2, 5], dtype=torch.int32)  # the second span is empty
    of_spans = torch.arange(3 * 2 * 4.0).view(3, 2, 4)
    wanted = [of_spans[span, :, place] for span, place in ((0, 0), (0, 1), (2, 0), (2, 1), (2, 2))]
    assert torch.equal(_by_query(of_spans, queries, 5, "efficient"), torch.stack(wanted))
