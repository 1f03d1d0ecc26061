"""A prompt with any number of completions, computed once, against each completion with its prompt in its own row."""

import helpers
import numpy as np
import pytest
import torch
from test_execution import mask_from_spans

from lowlevel.batch.layout import Shape, attention_mask, build_batch
from lowlevel.batch.segments import prompt_segment, sft_segment
from lowlevel.kernels.attention import list_keys

SIZES = ((5, (4, 2, 7, 1)), (3, (6,)), (1, (2, 3, 2)), (9, (1, 5, 3, 4, 2)))  # of prompts and their completions
SHAPES = {"as long as it is": None, "rounded": Shape(64, 8, 32, 128)}


def batches(shape=None):
    """The same tokens with prompts shared, and as plain rows; an SFT example is between them."""
    rng, shared, plain, number = np.random.default_rng(0), [], [], 0
    for row, (size, ends) in enumerate(SIZES):
        prompt, parts = rng.integers(3, 300, size), [rng.integers(3, 300, end) for end in ends]
        shared.append(prompt_segment(row, number, prompt, dict(enumerate(parts, 1))))
        plain += [[prompt_segment(row, number + i, prompt, {i + 1: part})] for i, part in enumerate(parts)]
        number += len(parts)
    example = sft_segment(len(SIZES), number, *[rng.integers(3, 300, 6)] * 2)
    rows = [[*shared[:2], example], shared[2:]]
    return build_batch(rows, pairs=False, shape=shape), build_batch([*plain, [example]], pairs=False)


@pytest.mark.parametrize("attention", ["sdpa", "lowlevel_math"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_those_of_plain_rows(tiny_base, shape, attention):
    policy, found = helpers.make_policy(tiny_base, dropout=0.2, attention=attention, seed=1), []
    for batch in batches(SHAPES[shape]):
        policy.flat.grad.zero_()
        policy.dropout.set_micro_batch(batch.dropout_keys, 7)
        sums = batch.sequence_sums(policy.token_logps(batch))[: len(batch.data_rows)]
        (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
        found.append((sums.detach(), policy.flat.grad.clone()))
    (logps, gradient), (expected, wanted) = found
    assert len(logps) == 14 and torch.allclose(logps, expected, rtol=1e-6, atol=1e-5)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


def test_a_prompt_with_three_completions_by_hand():
    parts = {1: np.array([8]), 2: np.array([9, 10]), 5: np.array([11])}
    batch = build_batch([[prompt_segment(7, 0, np.array([5, 6]), parts)]], pairs=False)
    assert batch.input_ids.tolist() == [[5, 6, 6, 9, 6, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 1, 2, 1, 0, 0, 0]]
    assert batch.branch_ids.tolist() == [[0, 1, 2, 2, 5, 0, 0, 0]]
    assert batch.scored_targets.tolist() == [8, 9, 10, 11] and batch.sequence_ids.tolist() == [0, 1, 1, 2]
    assert batch.lengths.tolist() == [1, 2, 1] and batch.data_rows == (7, 7, 7)
    assert batch.key_index.tolist() == [0, 1, 0, 2, 3, 0, 4, 5, 6, 7]
    assert batch.key_uses[:, :2].T.tolist() == [[0, 2, 5, 10], [1, 10, 10, 10]]
    assert batch.span_queries.tolist() == [0, 2, 4, 5, 8] and batch.span_keys.tolist() == [0, 2, 5, 7, 10]


@pytest.mark.parametrize("shape", SHAPES)
def test_spans_and_key_uses(shape):
    batch, _ = batches(SHAPES[shape])
    tokens = batch.segment_ids.flatten() >= 0
    expected = torch.block_diag(*attention_mask(batch)[:, 0].int()).bool()
    assert torch.equal(mask_from_spans(batch)[tokens], expected[tokens])
    assert len(batch.key_uses) == 8  # of five completions: few shapes
    positions = batch.input_ids.numel()
    assert shape == "as long as it is" or len(batch.key_index) == 2 * positions
    values = torch.randn(positions, 2, 4, dtype=torch.float64, requires_grad=True)
    listed = list_keys(values, batch.key_index, batch.key_uses)
    used = torch.zeros(len(listed), 1, 1, dtype=torch.float64)
    used[: int(batch.span_keys[-1])] = 1  # the rest of the list is padding
    direction = torch.randn(listed.shape, dtype=torch.float64) * used
    (found,) = torch.autograd.grad(listed, values, direction)
    assert torch.allclose(found, torch.zeros_like(values).index_add(0, batch.key_index, direction), atol=1e-13)


def test_many_completions_of_a_long_prompt_have_room_in_the_list():
    parts = {i: np.array([i]) for i in range(1, 9)}
    segment = prompt_segment(0, 0, np.arange(3, 35), parts)
    batch = build_batch([[segment]], pairs=False, shape=Shape(64, 8, 64, 64))
    assert len(batch.key_index) == 8 * 64 and batch.longest == 64  # 8 * 32 are used, 25 are of padding
    assert int(batch.span_keys[-1]) == 8 * 32 + 25
