"""Sixteen bits and a quantised base: the numbers are still those of training, on a GPU where there is one."""

import helpers
import pytest
import torch
from samples import chats, pairs

from lowlevel.inspection.records import inspect_pairs, inspect_sequences
from lowlevel.loop import evaluate_examples
from lowlevel.model.placement import Placement

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLACEMENTS = [
    pytest.param(Placement(torch.device("cpu"), "bf16"), id="cpu-bf16"),
    pytest.param(Placement(torch.device("cuda"), "fp16"), id="cuda-fp16", marks=needs_gpu),
]


@pytest.fixture(params=PLACEMENTS)
def rough(request, tiny_base):
    return helpers.make_policy(tiny_base, quantised=True, dropout=0.3, placement=request.param)


@pytest.mark.parametrize("packing", [True, False])
def test_the_losses_are_those_of_training(rough, packing):
    for method, examples, inspect in (
        (helpers.sft(packing=packing), chats(), inspect_sequences),
        (helpers.dpo(packing=packing), pairs(), inspect_pairs),
    ):
        records = inspect(rough, method, examples)
        count = sum(len(record.tokens) for record in records) if method.name == "sft" else len(records)
        logged = evaluate_examples(rough, method, method.micro_batches(examples), prefix="")["loss"]
        assert float(sum(record.loss for record in records)) / count == pytest.approx(logged, abs=1e-5)


def test_records_are_fp32_on_the_cpu_and_add_up(rough):
    for record in inspect_pairs(rough, helpers.dpo(), pairs()):
        for side in (record.chosen, record.rejected):
            tokens = (side.tokens.logps, side.ref_token_logps, side.contributions, side.tokens.predicted.entropies)
            for value in (*tokens, side.logp, side.reward, side.weight):
                assert (value.dtype, value.device.type) == (torch.float32, "cpu")
            assert (side.tokens.predicted.ranks >= 1).all() and torch.isfinite(side.tokens.logps).all()
        added = float(record.chosen.contributions.sum() + record.rejected.contributions.sum())
        assert added == pytest.approx(float(record.margin), abs=1e-5)
