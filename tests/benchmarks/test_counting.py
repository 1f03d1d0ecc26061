"""Counted operations against torch's own flop counter, the layout's mask, and numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case
from benchmarks.counting import ModelShape, Op, Settings, Work, dequantise, step_ops, totals, visible_pairs
from benchmarks.t4 import Counted, count_case, fit, scaled, t4_ceilings
from benchmarks.timing import Ceilings
from benchmarks.workload import case_config, llama_config

PRODUCTS = ("base products", "adapter products", "LM head")
SMALL = ModelShape(hidden=4, intermediate=8, layers=1, heads=2, kv_heads=1, vocabulary=10, rank=1)


def flops(ops, names):
    return sum(totals(ops)[name][0] for name in names)


def test_one_layer_by_hand():
    # q, o: 4 x 4; k, v: 4 x 2; gate, up: 4 x 8; down: 8 x 4. Weights: 16 + 8 + 8 + 16 + 32 + 32 + 32 = 144.
    # Adapters: in + out = 8 + 6 + 6 + 8 + 12 + 12 + 12 = 64. LM head: 4 x 10.
    settings = Settings("sft", recomputed=0, dropout=True, input_gradient=True)
    ops = step_ops(SMALL, [Work(positions=5, scored=3, pairs=15)], settings)
    assert flops(ops, ["base products"]) == 2 * 5 * 144 * 2  # forward, backward
    assert flops(ops, ["adapter products"]) == 2 * 5 * 64 * 3  # forward, gradient of weights, of inputs
    assert flops(ops, ["LM head"]) == 2 * 3 * 40 * 3
    assert flops(ops, ["attention"]) == 14 * 15 * 4
    assert SMALL.trainable == 64
    assert totals(ops)["optimizer"][1] == 64 * (4 + 4 + 8 + 28)


def test_the_lm_heads_chunks_are_those_of_its_path():
    """1,536 rows of 32,000 words: 3 chunks of 512 in the fused path, 2 of 1,024 in torch's; each reads the weight."""
    shape, work = ModelShape(2048, 5632, 1, 32, 4, 32000, 1), [Work(2048, 1536, 10)]
    for head, chunks, kernels in (("fused", 3, 3 + 4), ("torch", 2, 8 + 9)):
        ops = step_ops(shape, work, Settings("sft", recomputed=0, dropout=False, head=head))
        assert totals(ops)["LM head"][2] == chunks * kernels


def test_dequantised_bytes_by_hand():
    (op,) = dequantise(64 * 64)  # half a byte in and two out a weight, and a byte for each of 64 constants
    assert op.bytes == pytest.approx(64 * 64 * 2.5 + 64)


def test_adapter_casts_by_hand():
    ops = step_ops(SMALL, [Work(5, 3, 15)], Settings("sft", recomputed=0, dropout=True))
    assert totals(ops)["adapter casts"][1] == 2 * 64 * (4 + 2)  # forward and backward, fp32 in and fp16 out


def test_a_plan_by_hand():
    """Of two layers one is recomputed; dequantised once, no pass does it again."""
    shape, work = replace(SMALL, layers=2), [Work(5, 3, 15)]
    ops = step_ops(shape, work, Settings("sft", recomputed=1, dropout=True))
    assert flops(ops, ["base products"]) == 2 * 5 * 144 * 5  # forward and backward of two, and one forward again
    once = step_ops(shape, work, Settings("sft", recomputed=1, dropout=True, dequantised_once=True))
    assert totals(ops)["dequantise"][2] == 7 * 5 and "dequantise" not in totals(once)
    assert {k: v for k, v in totals(ops).items() if k != "dequantise"} == totals(once)


def test_a_budgets_case_is_counted_as_its_plan(tmp_path):
    """All 8 rows at once in 2 GB, and everything kept in 15 GiB."""
    common = {"tool": "lowlevel", "method": "sft", "batch": 1, "accumulation": 8}
    asked = Case("asked", **common)
    roomy = Case("roomy", budget="15GiB", **common)
    narrow = Case("narrow", budget="97.74MiB", **common)
    count = {case.name: count_case(case, "tiny", tmp_path / "counted", "fused") for case in (asked, roomy, narrow)}
    kernels = {name: totals(one.ops) for name, one in count.items()}
    assert "dequantise" in kernels["asked"] and "dequantise" not in kernels["roomy"]
    assert kernels["roomy"]["base products"][2] < kernels["asked"]["base products"][2]
    assert kernels["roomy"]["base products"][0] < kernels["narrow"]["base products"][0]


@pytest.fixture(scope="module")
def run(out):
    """Build a method's parts as a run would, on an unquantised base that the flop counter can see through."""
    from lowlevel.methods.choice import build_method
    from lowlevel.running.assembly import build_run_policy, check_inputs

    def build(method, checkpointing):
        case = Case("x", "lowlevel", method, checkpointing=checkpointing)
        config = case_config(case, out / "workload", out / "unused", 24)
        config = config.model_copy(update={"model": config.model.model_copy(update={"load_in_4bit": False})})
        inputs = check_inputs(config)
        built = build_method(config, inputs.attention)
        return build_run_policy(config, inputs), built, built.micro_batches(inputs.data.train[:8])

    return build


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_step_against_the_flop_counter(run, method, checkpointing):
    from lowlevel.execution import Eager
    from lowlevel.loop import optimizer_step
    from lowlevel.optim.loss_scale import LossScale

    policy, built, batches = run(method, checkpointing)
    asks = []
    policy.causal_lm.get_decoder().layers[0].register_forward_pre_hook(lambda m, x: asks.append(x[0].requires_grad))
    with FlopCounterMode(display=False) as counter:
        optimizer_step(Eager(policy, built), torch.optim.SGD([policy.flat.weights], 0.1), batches,
                       LossScale.for_precision("fp32"), seed=0, step=0, max_grad_norm=1.0)  # fmt: skip
    shape = ModelShape.of(llama_config("tiny"), 64)
    settings = Settings(method, shape.layers * checkpointing, dropout=True, compiled=False, input_gradient=any(asks))
    ops = step_ops(shape, [Work.of(batch) for batch in batches], settings)
    assert flops(ops, PRODUCTS) == counter.get_flop_counts()["Global"][torch.ops.aten.mm]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_visible_pairs_are_those_of_the_mask(run, method):
    from lowlevel.batch.layout import attention_mask

    for batch in run(method, False)[2]:
        counted = visible_pairs(batch.segment_ids.numpy(), batch.branch_ids.numpy())
        assert counted == int(attention_mask(batch).sum())


HERE = Ceilings("NVIDIA H100 80GB HBM3", 700e12, 3e12, 2e-6, 5e-6, 50e9)


def test_model_time_by_hand():
    ops = (Op("a", flops=7e9, bytes=3e6, count=2), Op("b", flops=7e6, bytes=3e9), Op("c", link_bytes=50e6))
    counted = Counted(Case("x", "lowlevel", "sft"), 1, ops)
    expected = 2 * (7e9 / 350e12) + 3e9 / 1.5e12 + 4 * 2e-6 + 1e-3  # halves of both ceilings, 4 kernels, 50 MB
    assert counted.seconds(HERE, (0.5, 0.5)) == pytest.approx(expected)


def test_fit_finds_the_fractions():
    shape = ModelShape(2048, 5632, 22, 32, 4, 32000, 64)
    counted = [
        Counted.of(Case("x", "lowlevel", "sft"), 1, step_ops(shape, works, Settings("sft", layers, True)))
        for layers in (0, 22)
        for works in ([Work(4096, 4088, 10**6)], [Work(512, 511, 10**5)] * 8)
    ]
    measured = [c.seconds(HERE, (0.6, 0.45)) for c in counted]
    assert fit(counted, measured, HERE) == pytest.approx((0.6, 0.45), abs=0.011)


def test_ceilings_of_a_t4():
    t4 = t4_ceilings(HERE)
    assert t4.matmul_flops == pytest.approx(65e12 * 700 / 989.4)
    assert t4.copy_bytes == pytest.approx(320e9 * 3 / 3.35)


def test_a_profile_is_scaled_by_the_data_sheets(tmp_path):
    """An H100 computes 989.4 / 65 times a T4 and moves 3.35 / 0.32 times its bytes; whole steps are not kernels."""
    table = tmp_path / "profile.csv"
    kinds = {"wall clock": 99, "GPU busy": 25, "products": 10, "attention": 1, "dequantise": 20, "copies": 2}
    lines = [f"a,{kind},{ms},NVIDIA H100 80GB HBM3" for kind, ms in kinds.items()]
    table.write_text("\n".join(["case,kind,ms,gpu", *lines, "b,products,1,NVIDIA H100"]))
    counted = dict.fromkeys("ab", Counted(Case("a", "lowlevel", "sft"), 4000, ()))
    a, b = scaled(table, counted)
    seconds = 11e-3 * 989.4 / 65 + 22e-3 * 3.35 / 0.32
    assert a["seconds_per_step"] == pytest.approx(seconds, abs=5e-4) and b["seconds_per_step"] == 0.015
    assert a["tokens_per_second"] == round(4000 / seconds) and "predicted" in str(a["kind"])
