"""Rows, masks, positions and targets of the packed layout, against definitions written out by hand or by loops."""

from dataclasses import replace
from itertools import product

import helpers
import numpy as np
import pytest
import torch

from lowlevel.batch.layout import PADDING, Shape, attention_mask, build_batch
from lowlevel.batch.packing import pack
from lowlevel.batch.segments import pair_segments, prompt_segment, sft_segment
from lowlevel.data.examples import PreferenceExample
from lowlevel.labels import IGNORED
from lowlevel.losses import token_logps


def ints(*values):
    return np.array(values)


def logps_of(policy, batch):
    with torch.no_grad():
        return token_logps(policy.scored_hidden_states(batch), policy.lm_head_weight, batch.scored_targets)


def mixed_rows():
    """Rows of segments, of all three kinds."""
    rng = np.random.default_rng(3)

    def ids(n):
        return rng.integers(3, 300, n)

    def one(number, kind):
        if kind == "sft":
            tokens = ids(rng.integers(2, 9))
            return sft_segment(number, 2 * number, tokens, tokens)
        prompt, chosen, rejected = (ids(rng.integers(1, 6)) for _ in range(3))
        return prompt_segment(number, 2 * number, prompt, {1: chosen, 2: rejected})

    kinds = [["pair", "sft", "pair"], ["sft"], ["pair", "pair"], ["sft", "sft", "sft"]]
    numbers = iter(range(99))
    return [[one(next(numbers), kind) for kind in row] for row in kinds]


def test_the_mask_is_the_rule_written_out_as_loops():
    rows = mixed_rows()
    batch = build_batch(rows, pairs=True, shape=Shape(48, 1, 48, 96))
    mask = attention_mask(batch)[:, 0]
    for r, row in enumerate(rows):
        places = [(s, branch) for s, segment in enumerate(row) for branch in segment.branch_ids]
        for query, key in product(range(48), repeat=2):
            if query < len(places) and key < len(places):
                (segment, branch), (key_segment, key_branch) = places[query], places[key]
                sees = key <= query and segment == key_segment and (key_branch == 0 or key_branch == branch)
                assert mask[r, query, key] == sees, (r, query, key)
            elif query < len(places) or key < len(places):
                assert not mask[r, query, key], "tokens and padding do not see each other"
        assert mask[r].any(-1).all(), "a query without any key would be a softmax over nothing"


PAIR = PreferenceExample(7, "", ints(5, 6, 7), ints(8, 9), ints(10, 11, 12))


def test_a_pair_by_hand():
    batch = build_batch([pair_segments(PAIR, 0, shared=True)], pairs=True)
    no = IGNORED
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 7, 10, 11, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0]]
    assert batch.branch_ids.tolist() == [[0, 0, 1, 1, 2, 2, 2, 0]]
    assert batch.segment_ids.tolist() == [[0] * 7 + [PADDING]]
    assert batch.targets.tolist() == [[no, no, 8, 9, 10, 11, 12, no]]
    assert batch.scored_positions.tolist() == [2, 3, 4, 5, 6]
    assert batch.scored_targets.tolist() == [8, 9, 10, 11, 12]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.sequence_sums(torch.tensor([1.0, 2.0, 10.0, 20.0, 30.0])).tolist() == [3.0, 60.0]
    assert (batch.num_tokens, batch.num_scored, batch.data_rows) == (7, 5, (7,))


def test_the_same_pair_as_two_rows_by_hand():
    batch = build_batch([[s] for s in pair_segments(PAIR, 0, shared=False)], pairs=True)
    no = IGNORED
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 0, 0, 0, 0], [5, 6, 7, 10, 11, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 0, 0], [0, 1, 2, 3, 4, 0, 0, 0]]
    assert batch.targets.tolist() == [[no, no, 8, 9, no, no, no, no], [no, no, 10, 11, 12, no, no, no]]
    assert batch.lengths.tolist() == [2, 3] and batch.data_rows == (7,)


def test_examples_by_hand():
    first = sft_segment(4, 0, ints(5, 6, 7, 8), ints(IGNORED, IGNORED, 7, 8))
    second = sft_segment(9, 1, ints(20, 21), ints(20, 21))
    batch = build_batch([[first, second]], pairs=False)
    no = IGNORED
    assert batch.input_ids.tolist() == [[5, 6, 7, 20, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1] + [PADDING] * 4]
    assert batch.targets.tolist() == [[no, 7, 8, 21, no, no, no, no]]
    assert batch.lengths.tolist() == [2, 1] and batch.data_rows == (4, 9)
    assert batch.sequence_sums(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]


def test_sums_of_several_pairs_are_all_chosen_then_all_rejected():
    pairs = [(1, "", ints(3), ints(4, 5), ints(6)), (2, "", ints(7, 8), ints(9), ints(10, 11))]
    row = [pair_segments(PreferenceExample(*pair), i, shared=True)[0] for i, pair in enumerate(pairs)]
    batch = build_batch([row], pairs=True)
    assert batch.scored_targets.tolist() == [4, 5, 6, 9, 10, 11]
    assert batch.sequence_sums(batch.scored_targets.float()).tolist() == [9.0, 9.0, 6.0, 21.0]


def test_packing_loses_nothing_and_never_exceeds_a_row():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 65, rng.integers(1, 40)).tolist()
        rows = pack(lengths, 64)
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        assert all(sum(lengths[item] for item in row) <= 64 for row in rows)
        assert rows == pack(lengths, 64)
        assert rows == sorted(sorted(row) for row in rows)


def fewest_rows(lengths, capacity):
    """The optimum, by trying every assignment."""

    def place(items, rooms):
        if not items:
            return len(rooms)
        best = len(lengths)
        for i, room in enumerate(rooms):
            if room >= items[0]:
                best = min(best, place(items[1:], [*rooms[:i], room - items[0], *rooms[i + 1 :]]))
        return min(best, place(items[1:], [*rooms, capacity - items[0]]))

    return place(tuple(lengths), [])


def test_packing_needs_at_most_the_rows_that_first_fit_decreasing_may():
    rng = np.random.default_rng(1)
    for _ in range(60):
        lengths = rng.integers(1, 11, rng.integers(1, 8)).tolist()
        assert len(pack(lengths, 10)) <= 11 / 9 * fewest_rows(lengths, 10) + 6 / 9  # Dosa's tight bound (2007)


def test_packing_takes_long_items_first():
    assert pack([3, 3, 7, 7], 10) == [[0, 2], [1, 3]]  # in the order given, first-fit needs three rows


def test_an_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="65 positions does not fit a row of 64"):
        pack([3, 65], 64)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_ids_at_padding_change_nothing(tiny_base, kind):
    policy = helpers.make_policy(tiny_base)
    method = helpers.sft(packing=True) if kind == "sft" else helpers.dpo(packing=False)
    (batch,) = method.micro_batches(helpers.ragged_examples(5) if kind == "sft" else helpers.ragged_pairs(5))
    padding = batch.segment_ids == PADDING
    assert padding.any()
    noise = torch.randint(3, 300, batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    other = replace(batch, input_ids=torch.where(padding, noise, batch.input_ids))

    def outcome(batch):
        policy.flat.grad.zero_()
        loss = method.loss(policy, batch).loss
        loss.backward()
        return loss.detach(), policy.flat.grad.clone(), logps_of(policy, batch)

    assert all(torch.equal(*pair) for pair in zip(outcome(batch), outcome(other), strict=True))


def test_examples_of_one_row_do_not_read_each_other(tiny_base):
    policy = helpers.make_policy(tiny_base)
    examples = helpers.ragged_examples(4, longest=20)
    method = helpers.sft(packing=True, row_length=128)

    def logps(examples):
        (batch,) = method.micro_batches(examples)
        assert batch.input_ids.shape[0] == 1
        return torch.tensor_split(logps_of(policy, batch), batch.lengths.cumsum(0)[:-1])

    before = logps(examples)
    for changed, example in enumerate(examples):
        ids = (example.input_ids + 11) % 300
        other = replace(example, input_ids=ids, labels=np.where(example.labels >= 0, ids, IGNORED))
        after = logps([*examples[:changed], other, *examples[changed + 1 :]])
        for i in range(len(examples)):
            assert torch.equal(before[i], after[i]) == (i != changed)


def test_pairs_of_one_row_do_not_read_each_other_nor_a_branch_its_sibling(tiny_base):
    policy = helpers.make_policy(tiny_base)
    pairs = helpers.ragged_pairs(3, longest=10)
    method = helpers.dpo(packing=True, row_length=128)

    def logps(pairs):
        (batch,) = method.micro_batches(pairs)
        assert batch.input_ids.shape[0] == 1
        with torch.no_grad():
            return helpers.completion_logps(policy, batch)

    chosen, rejected = logps(pairs)
    for changed, pair in enumerate(pairs):
        other = replace(pair, chosen_ids=(pair.chosen_ids + 11) % 300)
        new_chosen, new_rejected = logps([*pairs[:changed], other, *pairs[changed + 1 :]])
        assert (chosen == new_chosen).tolist() == [i != changed for i in range(3)]
        assert torch.equal(rejected, new_rejected)
        other = replace(pair, rejected_ids=(pair.rejected_ids + 11) % 300)
        new_chosen, new_rejected = logps([*pairs[:changed], other, *pairs[changed + 1 :]])
        assert torch.equal(chosen, new_chosen)
        assert (rejected == new_rejected).tolist() == [i != changed for i in range(3)]


@pytest.mark.parametrize("method", [helpers.sft(), helpers.dpo()], ids=["sft", "dpo"])
def test_a_methods_name_is_its_class_own(method, request):
    assert method.name == request.node.callspec.id
    with pytest.raises(TypeError, match="name"):
        type(method)(**vars(method) | {"name": "other"})
