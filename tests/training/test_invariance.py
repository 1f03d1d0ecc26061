"""One step is one number, however its examples are split, packed and recomputed; and it is transformers' number."""

from functools import partial
from itertools import product

import helpers
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM

from lowlevel.model.adapters import save_adapter
from lowlevel.model.policy import TRAINED

BOUND = 1e-6
# Largest element of a gradient. A completion's logp is a sum of some tens of nats, whose rounding (some 1e-6 in each of
# four, times beta) moves the pair's whole gradient: seen over 4 seeds, in fp32 and nf4, were up to 9.4e-7 for dpo with
# short completions (1.13e-6 with long ones) and 7.3e-7 for sft.
LARGEST = {"sft": 1e-6, "dpo": 2e-6}


LOSSES = {
    "sft": {},
    "sft, label smoothing and z-loss": {"loss_type": "smoothed_cross_entropy", "z_loss_weight": 0.01},
    "sft, dft": {"loss_type": "dft"},
    "dpo": {"disable_dropout": False},  # dropout stays on, or there would be nothing to keep the same
    "dpo, wpo": {"disable_dropout": False, "loss_type": "wpo"},
}


def layouts(kind: str):
    """(name, method) for 8x1, 4x2, 2x4, 1x8 and packed rows; pairs packed share their prompt, others do not."""
    make = partial(helpers.sft if kind.startswith("sft") else helpers.dpo, **LOSSES[kind])
    for size in (8, 4, 2, 1):
        yield f"{size}x{8 // size}", make(size)
    yield "packed, one batch", make(8, packing=True)
    yield "packed, row by row", make(1, packing=True)
    yield "packed, long rows", make(2, packing=True, row_length=200)


@pytest.mark.parametrize(
    ("kind", "quantised", "dropout"),
    [*product(("sft", "dpo"), (False, True), (0.0, 0.1)), *((kind, True, 0.1) for kind in LOSSES if "," in kind)],
)
def test_a_step_does_not_depend_on_its_layout(tiny_base, kind, quantised, dropout):
    """In nf4 and not, with dropout and without; variants of a loss, which has no part in either, only with both."""
    examples = helpers.ragged_examples() if kind.startswith("sft") else helpers.ragged_pairs(longest=8)
    expected = None
    for checkpointing in (False, True)[: 2 if kind in ("sft", "dpo") else 1]:
        policy = helpers.make_policy(tiny_base, quantised=quantised, dropout=dropout, checkpointing=checkpointing)
        for name, method in layouts(kind):
            loss, gradient = helpers.loss_and_gradient(policy, method, examples)
            expected = expected or (loss, gradient)
            assert loss == pytest.approx(expected[0], rel=BOUND), (name, checkpointing)
            largest, mean = helpers.drifts(gradient, expected[1])
            assert largest <= LARGEST[kind[:3]] and mean <= BOUND, (name, checkpointing, largest, mean)
    assert expected[1].norm() > (0.1 if kind in ("sft", "dpo") else 5e-3)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_checkpointing_recomputes(tiny_base, kind):
    """Else the comparison above would compare a thing with itself: each block runs once more in the backward pass."""
    runs = []
    for checkpointing in (False, True):
        policy = helpers.make_policy(tiny_base, checkpointing=checkpointing)
        calls = []
        attention = policy.model.get_base_model().model.layers[0].self_attn
        attention.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        if kind == "sft":
            helpers.step(policy, helpers.sft(), helpers.ragged_examples())
        else:
            helpers.step(policy, helpers.dpo(), helpers.ragged_pairs())
        runs.append(len(calls))
    assert runs == ([1, 2] if kind == "sft" else [2, 3])  # dpo: the reference pass has no backward to recompute for


def plain_model(policy, tiny_base, tmp_path):
    """The same weights through transformers and PEFT alone."""
    save_adapter(policy.model, TRAINED, tmp_path / "adapter", str(tiny_base))
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    return model.double()


def gradients(model, policy) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain model's gradient and the policy's, in the order of the policy's parameters."""
    plain = {name.replace(".default.", ".trained."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    own = policy.flat.named_grads()
    assert plain.keys() == own.keys()
    return torch.cat([plain[name].flatten() for name in own]), torch.cat([grad.flatten() for grad in own.values()])


def test_the_sft_loss_and_gradient_against_transformers_in_float64(tiny_base, tmp_path):
    policy = helpers.make_policy(tiny_base)
    examples = helpers.ragged_examples()
    loss, _ = helpers.loss_and_gradient(policy, helpers.sft(2, packing=True), examples)
    model = plain_model(policy, tiny_base, tmp_path)
    sums, counts = [], []
    for example in examples:
        logits = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0]
        places = [t for t in range(1, len(example.input_ids)) if example.labels[t] != -100]
        tokens = torch.tensor([int(example.input_ids[t]) for t in places])
        sums.append(cross_entropy(logits[[t - 1 for t in places]], tokens, reduction="sum"))
        counts.append(len(places))
    expected = sum(sums) / sum(counts)
    expected.backward()
    assert expected.dtype == torch.float64
    assert loss == pytest.approx(expected.item(), rel=BOUND)
    plain, own = gradients(model, policy)
    assert max(helpers.drifts(own, plain)) < 5e-6
    mean_of_means = np.mean([s.item() / n for s, n in zip(sums, counts, strict=True)])
    assert abs(mean_of_means - expected.item()) > 1e-2, "ragged enough that a mean of means would be another number"


@pytest.mark.parametrize("packing", [False, True], ids=["two rows", "shared prompt"])
def test_the_dpo_loss_and_gradient_against_transformers_in_float64(tiny_base, tmp_path, packing):
    policy = helpers.make_policy(tiny_base)
    pairs = helpers.ragged_pairs()
    result = helpers.step(policy, helpers.dpo(2, packing=packing), pairs)
    model = plain_model(policy, tiny_base, tmp_path)

    def logp(prompt, completion):
        ids = torch.from_numpy(np.concatenate([prompt, completion]))
        scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        return sum(scores[t - 1, ids[t]] for t in range(len(prompt), len(ids)))

    losses, margins = [], []
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():
            references = [logp(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        chosen, rejected = (logp(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids))
        margins.append(0.1 * ((chosen - references[0]) - (rejected - references[1])))
        losses.append(-logsigmoid(margins[-1]))
    expected = sum(losses) / len(losses)
    expected.backward()
    assert result.metrics["loss"] == pytest.approx(expected.item(), rel=BOUND)
    assert result.metrics["rewards/margins"] == pytest.approx(torch.stack(margins).mean().item(), abs=2e-6)
    assert result.metrics["rewards/accuracies"] == sum(m.item() > 0 for m in margins) / len(margins)
    plain, own = gradients(model, policy)
    assert max(helpers.drifts(own, plain)) < 5e-6


def test_accumulation_divides_by_the_tokens_of_the_whole_step(tiny_base):
    """By hand: the gradient of the step is the sum of single-example gradients, weighted by their token counts."""
    policy = helpers.make_policy(tiny_base)
    examples = helpers.ragged_examples()
    loss, gradient = helpers.loss_and_gradient(policy, helpers.sft(1), examples)
    counts = [int((example.labels[1:] != -100).sum()) for example in examples]
    singles = [helpers.loss_and_gradient(policy, helpers.sft(1), [example]) for example in examples]
    weighted = sum(n * single[1].double() for n, single in zip(counts, singles, strict=True)) / sum(counts)
    assert max(helpers.drifts(gradient, weighted)) <= BOUND
    assert loss == pytest.approx(sum(n * s[0] for n, s in zip(counts, singles, strict=True)) / sum(counts), rel=BOUND)
    unweighted = sum(single[1].double() for single in singles) / len(singles)
    assert helpers.drifts(gradient, unweighted)[0] > 1e-2, "mean of means is another gradient"
    assert loss != pytest.approx(np.mean([single[0] for single in singles]), rel=1e-3)
