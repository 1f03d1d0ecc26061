"""Batches that are filled up to a fixed shape, as on a GPU: what only fills up is in no record."""

from dataclasses import replace

import helpers
import pytest
import torch
from samples import chats, pairs

from lowlevel.batch.layout import Shape
from lowlevel.inspection.records import inspect_pairs, inspect_sequences

SHAPE = Shape(positions=16, examples=4, longest=64, capacity=96)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "rpo"])
def test_pairs_in_filled_batches_are_the_same(policy, name):
    plain = helpers.dpo(packing=True, loss_type=name)
    filled = replace(plain, shape=SHAPE)
    batches = filled.micro_batches(pairs(7))
    assert any(len(batch.lengths) // 2 > len(batch.data_rows) for batch in batches)
    assert any(len(batch.scored_positions) > batch.num_scored for batch in batches)
    for one, other in zip(inspect_pairs(policy, filled, pairs(7)), inspect_pairs(policy, plain, pairs(7)), strict=True):
        assert one.row == other.row
        for side, same in ((one.chosen, other.chosen), (one.rejected, other.rejected)):
            assert torch.equal(side.tokens.ids, same.tokens.ids)
            assert torch.equal(side.tokens.positions, same.tokens.positions)
            assert torch.allclose(side.contributions, same.contributions, atol=1e-5)
            assert float(side.weight) == pytest.approx(float(same.weight), abs=1e-5)
        assert float(one.loss) == pytest.approx(float(other.loss), abs=1e-4)
        assert float(one.margin) == pytest.approx(float(other.margin), abs=1e-5)


def test_conversations_in_filled_batches_are_the_same(policy):
    plain = helpers.sft(packing=True)
    for one, other in zip(
        inspect_sequences(policy, replace(plain, shape=SHAPE), chats()),
        inspect_sequences(policy, plain, chats()),
        strict=True,
    ):
        assert torch.equal(one.tokens.ids, other.tokens.ids)
        assert torch.allclose(one.tokens.logps, other.tokens.logps, atol=1e-5)
        assert torch.equal(one.tokens.predicted.ranks, other.tokens.predicted.ranks)
