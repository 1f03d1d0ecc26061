"""The shapes of a run: chosen from the real layout of its steps, counted here batch by batch."""

from dataclasses import replace

import helpers
import pytest

from lowlevel.batch.order import DataOrder
from lowlevel.config.file import config_from_tables
from lowlevel.execution import signature_of
from lowlevel.methods import choice
from lowlevel.methods.choice import CAPTURE, build_method, fitted
from lowlevel.model.attention_choice import MASKED, NAMES, Attention
from lowlevel.running.rehearsal import largest_batch

SPANS = Attention(NAMES["math"], "as on a GPU")
ROWS = {
    "sft": helpers.ragged_examples(60, longest=500),
    "reward": helpers.ragged_pairs(60, longest=150),
    "dpo": helpers.ragged_pairs(60, longest=150),
}


def run(method, steps=20, **sections):
    tables = {"method": method, "data": {"max_length": 512}, "train": {"max_steps": steps}, **sections}
    config = config_from_tables(tables, "test")
    return config, build_method(config, SPANS)


def laid_out(method, config, rows, steps):
    """The micro-batches of a run's first steps."""
    order = DataOrder.of(config, rows)
    return [batch for step in range(steps) for batch in method.micro_batches([rows[i] for i in order.step_rows(step)])]


def cost(method, config, rows, steps):
    """Positions that are computed, and those of the captures: of every shape, the rehearsal's included."""
    batches = laid_out(method, config, rows, steps)
    shapes = {signature_of(batch) for batch in [*batches, largest_batch(method, rows, 8)]}
    return sum(batch.input_ids.numel() for batch in batches) + CAPTURE * len(shapes)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("steps", [4, 40])
def test_the_shape_is_the_best_of_the_multiples_and_each_width_is_one_shape(name, steps):
    config, plain = run(name, steps)
    found, rows = build_method(config, SPANS, ROWS[name]), ROWS[name]
    batches = laid_out(found, config, rows, steps)
    assert len({signature_of(one) for one in batches}) == len({one.input_ids.numel() for one in batches})
    assert {k: v for k, v in vars(found.shape).items() if k not in ("positions", "fill")} == {
        k: v for k, v in vars(plain.shape).items() if k not in ("positions", "fill")
    }
    costs = {}
    for k in (0.5, 1, 2, 4):
        shape = replace(found.shape, positions=int(plain.shape.positions * k), fill=1.0)
        costs[shape.positions] = cost(replace(plain, shape=shape), config, rows, steps)
    assert costs[found.shape.positions] == min(costs.values())


@pytest.mark.parametrize("name", ROWS)
def test_scored_tokens_are_those_of_a_batch(name):
    _, method = run(name)
    for example in ROWS[name][:9]:
        assert choice._scored(method, example) == method.micro_batches([example])[0].num_scored


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_room_for_scored_tokens_is_that_of_the_fullest_batch(name):
    config, plain = run(name)
    found = fitted(plain, config, ROWS[name])
    batches = laid_out(found, config, ROWS[name], 20)
    fullest = max(one.num_scored / one.input_ids.numel() for one in batches)
    assert 0 <= found.shape.fill - fullest < 1 / 16
    assert {len(one.scored_targets) / one.input_ids.numel() for one in batches} == {found.shape.fill}


def test_the_first_steps_stand_for_the_others(monkeypatch):
    """60 rows in sequential order are the same 8 steps in each epoch; a longer run of them pads less."""
    chosen = {}
    for looked_at in (8, 256):
        monkeypatch.setattr(choice, "LOOKED_AT", looked_at)
        for steps in (2, 16, 240):
            config, method = run("sft", train={"max_steps": steps, "data_order": "sequential"})
            chosen[steps, looked_at] = fitted(method, config, ROWS["sft"]).shape
    assert all(chosen[steps, 8] == chosen[steps, 256] for steps in (2, 16, 240))
    widths = [chosen[steps, 8].positions for steps in (2, 16, 240)]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


@pytest.mark.parametrize("name", ["kto", "grpo", "online_dpo"])
def test_methods_whose_rows_come_later_or_share_prompts_keep_their_shape(name):
    config, method = run(name)
    assert fitted(method, config, [None] * 9) is method


def test_without_spans_there_is_no_shape_to_fit():
    config, _ = run("sft")
    method = build_method(config, MASKED)
    assert fitted(method, config, ROWS["sft"]) is method and method.shape is None


def test_a_loss_that_mixes_pairs_keeps_its_micro_batches():
    """Others divide a step's rows evenly: 9 pairs of 3 sizes in two micro-batches of about one sum."""
    sizes = {}
    for loss in ("aot", "sigmoid"):
        config, method = run("dpo", dpo={"loss_type": loss})
        batches = fitted(method, config, ROWS["dpo"]).micro_batches(ROWS["dpo"][:24])
        sizes[loss] = [one.num_tokens for one in batches]
    assert len(sizes["aot"]) == len(sizes["sigmoid"]) > 1 and sum(sizes["aot"]) == sum(sizes["sigmoid"])
    assert max(sizes["sigmoid"]) - min(sizes["sigmoid"]) < 100 < max(sizes["aot"]) - min(sizes["aot"])
