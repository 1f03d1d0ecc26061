"""KTO steps: z0 is one number of the whole step, so the split of a step changes neither loss nor gradient."""

import math
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch

import lowlevel.methods.kto
from lowlevel.batch.layout import Shape
from lowlevel.config.file import config_from_tables
from lowlevel.errors import ConfigError
from lowlevel.execution import Eager, WithFallback
from lowlevel.loop import evaluate_examples, with_baseline
from lowlevel.optim.loss_scale import LossScale
from lowlevel.running.observer import check_first_step, starts_as_reference

BOUND = 1e-6


def layouts(count, **config):
    for size in sorted({count, 4, 2, 1}):
        yield f"{size} a micro-batch", helpers.kto(size, **config)
    yield "packed", helpers.kto(1, packing=True, **config)
    yield "packed, long rows", helpers.kto(2, packing=True, row_length=200, **config)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("count", [8, 7, 1])
def test_a_step_does_not_depend_on_its_split(tiny_base, count, dropout):
    """Also with an odd number of rows, and with a single one, which has no mismatched completion: z0 = 0."""
    policy = helpers.make_policy(tiny_base, dropout=dropout, seed=1)
    found = {}
    for name, method in layouts(count, disable_dropout=False, beta=0.2, undesirable_weight=1.5):
        result = helpers.step(policy, method, helpers.labelled_examples(count, longest=18))
        found[name] = result, policy.flat.grad.clone()
    (expected, gradient), *others = found.values()
    assert expected.count == count and gradient.norm() > 0.05
    assert expected.metrics["kl"] > 0.5 or count == 1  # or the clamp would hide it
    for result, other in others:
        assert result.loss == pytest.approx(expected.loss, rel=BOUND)
        assert result.metrics == pytest.approx(expected.metrics, rel=BOUND, abs=2e-5)  # fp32 of some hundred nats
        largest, mean = helpers.drifts(other, gradient)
        assert largest <= 2 * BOUND and mean <= BOUND, (largest, mean)  # as dpo's in test_invariance.py


def ratio(policy, example):
    """log pi - log ref of the scored tokens, of a sequence alone, without dropout."""
    (batch,) = helpers.sft(1).micro_batches([example])
    policy.dropout.disable()
    with torch.no_grad():
        logps = policy.token_logps(batch).double().sum()
        with policy.reference():
            return float(logps - policy.token_logps(batch).double().sum())


def test_a_step_by_hand(tiny_base):
    """z0 and the loss from sequences that are put together and scored here, one by one."""
    policy, examples = helpers.make_policy(tiny_base, dropout=0.1, seed=4), helpers.labelled_examples(5)
    starts = [int((x.labels >= 0).argmax()) for x in examples]
    others = [2, 2, 4, 4, 0]  # rows 0 and 1, and 2 and 3, have one prompt
    kls = []
    for i, j in enumerate(others):
        one, other = examples[i], examples[j]
        ids = np.concatenate([one.input_ids[: starts[i]], other.input_ids[starts[j] :]])
        labels = np.concatenate([one.labels[: starts[i]], other.labels[starts[j] :]])
        kls.append(ratio(policy, helpers.Tokens(0, ids, labels)))
    kl = sum(kls) / 5
    terms = []
    for example in examples:
        x = 0.5 * (ratio(policy, example) - max(0.0, kl))
        terms.append(1.25 / (1 + math.exp(x)) if example.values == (1.0,) else 0.75 / (1 + math.exp(-x)))
    settings = {"beta": 0.5, "desirable_weight": 1.25, "undesirable_weight": 0.75}
    metrics = helpers.step(policy, helpers.kto(2, **settings), examples).metrics
    assert kl > 0.5 and metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["loss"] == pytest.approx(sum(terms) / 5, rel=1e-6)


def test_completions_of_other_prompts_are_cut_to_the_row(tiny_base):
    policy, examples = helpers.make_policy(tiny_base), helpers.labelled_examples()
    method = helpers.kto(2, row_length=max(len(x.input_ids) for x in examples))
    cut = replace(method, row_length=20)
    lengths = [len(x.input_ids) for x in cut.mismatched([x for x in examples if len(x.input_ids) <= 20])]
    assert lengths and max(lengths) <= 20
    assert [x.labels[0] for x in method.mismatched(examples)] == [-100] * 8
    assert helpers.step(policy, method, examples).metrics["share/desirable"] == pytest.approx(2 / 8)


def test_one_prompt_or_one_label(tiny_base):
    """Without another prompt z0 = 0; a label without rows has no means, and the other one's stay."""
    policy, examples = helpers.make_policy(tiny_base), helpers.labelled_examples(2)
    metrics = helpers.step(policy, helpers.kto(), [replace(x, values=(1.0,)) for x in examples]).metrics
    assert metrics["kl"] == 0.0 and metrics["share/undesirable"] == 0.0
    assert "rewards/margins" not in metrics and "rewards/undesirable" not in metrics
    assert metrics["rewards/desirable"] == pytest.approx(
        0.1 * (metrics["logps/desirable"] - metrics["logps/ref_desirable"]), rel=1e-5
    )


def test_metrics_are_means_over_the_examples_of_a_label(tiny_base):
    policy, examples = helpers.make_policy(tiny_base), helpers.labelled_examples(7)
    metrics = helpers.step(policy, helpers.kto(2), examples).metrics
    for label, wanted in (("desirable", 1.0), ("undesirable", 0.0)):
        own = [0.1 * ratio(policy, x) for x in examples if x.values == (wanted,)]
        assert metrics[f"rewards/{label}"] == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert metrics["rewards/margins"] == metrics["rewards/desirable"] - metrics["rewards/undesirable"]


def test_a_step_that_overflows_keeps_its_baseline(tiny_base, monkeypatch):
    """The mismatched completions run once, also if the step is repeated at half the scale."""
    policy, examples = helpers.make_policy(tiny_base, seed=1), helpers.labelled_examples()
    expected = helpers.step(policy, helpers.kto(2), examples).metrics
    ran = []
    original = Eager.run
    monkeypatch.setattr(Eager, "run", lambda self, batch, *rest: ran.append(batch.kl) or original(self, batch, *rest))
    scale = LossScale(2.0**70)
    result = helpers.step(policy, helpers.kto(2), examples, scale=scale)
    assert scale.skipped_steps > 0 and result.metrics["kl"] == expected["kl"]
    assert [kl is None for kl in ran] == [True] * 2 + [False] * 4 * (1 + scale.skipped_steps)


def test_an_evaluation_has_one_baseline(tiny_base):
    policy, examples = helpers.make_policy(tiny_base, dropout=0.1), helpers.labelled_examples()
    found = [
        evaluate_examples(policy, method, method.micro_batches(examples), prefix="eval_")
        for method in (helpers.kto(8), helpers.kto(1), helpers.kto(1, packing=True))
    ]
    for scores in found[1:]:
        assert scores == pytest.approx(found[0], rel=1e-5, abs=1e-5)
    assert found[0]["eval_kl"] != 0


def test_rounded_shapes_change_nothing(tiny_base):
    """Dummy examples and tokens, as a captured graph has them, are in no sum; mismatched batches have few widths."""
    policy, examples = helpers.make_policy(tiny_base), helpers.labelled_examples()
    shaped = replace(helpers.kto(2, packing=True), shape=Shape(16, 4, 64, 128))
    plain, rounded = (helpers.step(policy, method, examples).metrics for method in (helpers.kto(2), shaped))
    assert rounded == pytest.approx(plain, rel=1e-5, abs=1e-5)
    (first, *_) = shaped.micro_batches(examples)
    assert {batch.input_ids.shape[1] for batch in first.mismatched} <= {64, 128}
    assert all(batch.kl is not None for batch in with_baseline(Eager(policy, shaped), shaped.micro_batches(examples)))


@pytest.mark.slow  # the same layers as dpo's
def test_compiled_layers_give_the_same_step(tiny_base):
    policy, examples = helpers.make_policy(tiny_base, attention="lowlevel_math", seed=1), helpers.labelled_examples()
    method = replace(helpers.kto(2, packing=True), shape=Shape(16, 4, 64, 96))
    expected, gradient = helpers.loss_and_gradient(policy, method, examples)
    execution = WithFallback(policy, method, "compiled", pytest.fail)
    result = helpers.step(policy, method, examples, execution=execution)
    assert result.loss == pytest.approx(expected, rel=1e-5) and result.metrics["kl"] > 0
    assert max(helpers.drifts(policy.flat.grad, gradient)) < 1e-4


def test_a_first_step_with_another_reference_is_refused(tiny_base, monkeypatch):
    """With a fresh adapter every log-ratio is exactly 0, that of the mismatched completions too."""
    policy, examples = helpers.make_policy(tiny_base, randomize=False), helpers.labelled_examples()
    config = config_from_tables({"method": "kto"}, "test")
    result = helpers.step(policy, helpers.kto(2), examples)
    assert starts_as_reference(config) and check_first_step(result, config, "fp32") is None
    assert result.loss == 0.5 and result.metrics["kl"] == 0.0
    plain = lowlevel.methods.kto.reference_token_logps
    monkeypatch.setattr(lowlevel.methods.kto, "reference_token_logps", lambda *given: plain(*given) + 1e-3)
    with pytest.raises(ConfigError, match="step 1: a fresh adapter's margins are not 0"):
        check_first_step(helpers.step(policy, helpers.kto(2), examples), config, "fp32")


def test_prompts_and_mismatched_completions_that_are_the_same_are_computed_once():
    """Prompts p, q, p of 3 and 2 tokens; the first and the third example have one mismatched completion, that of q."""
    ids = np.arange(3, 30)
    parts = (ids[:3], ids[5:7]), (ids[10:12], ids[12:16]), (ids[:3], ids[20:23])
    made = [np.concatenate(part) for part in parts]
    labels = [np.where(np.arange(len(x)) < len(prompt), -100, x) for x, (prompt, _) in zip(made, parts, strict=True)]
    examples = [helpers.Tokens(i, x, y, (1.0,)) for i, (x, y) in enumerate(zip(made, labels, strict=True))]
    (first,) = helpers.kto(1, packing=True).micro_batches(examples)
    assert first.data_rows == (0, 2, 1) and first.num_tokens == (2 + 2 + 3) + (1 + 4)
    (other,) = first.mismatched
    assert other.num_tokens == (2 + 4) + (1 + 3) and other.data_rows == (0, 0, 1)
    assert other.row_values.tolist() == [[2.0, 1.0]] and other.lengths.tolist() == [4, 3]
    plain = helpers.kto(1).micro_batches(examples)
    assert [batch.num_tokens for batch in plain] == [len(x) - 1 for x in made]
