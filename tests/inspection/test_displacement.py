"""Which tokens took the probability of displaced pairs: by hand, against float64, and where the answer was planted."""

import io
import re
from dataclasses import replace

import helpers
import pytest
import torch
from rich.console import Console
from samples import inspection_of_pairs, pairs

import lowlevel.inspection.displacement as module
from lowlevel.batch.layout import Shape
from lowlevel.inspection.displacement import displacement_of, largest_gains
from lowlevel.inspection.page import render_page
from lowlevel.inspection.pairs import fall_line, inspect_pairs
from lowlevel.inspection.terminal import print_inspection

LAYOUTS = [{"packing": True}, {"packing": False}, {"packing": False, "batch_size": 3}]
SHAPE = Shape(positions=16, examples=4, longest=64, capacity=96)
PLANTED = 301  # in no chosen completion


def of_probabilities(policy: list[list[float]], reference: list[list[float]], targets: list[int], **keys):
    """A head whose predictions are given: hidden states are unit vectors, logits are logarithms."""
    count = len(targets)
    weight = torch.tensor([*policy, *reference]).log().T.contiguous()  # (V, 2N)
    states = torch.eye(2 * count)
    return displacement_of(states[:count], states[count:], weight, torch.tensor(targets), **keys)


def test_by_hand():
    """Position 0: the target 0 loses 0.5; 1 gains 0.4, 3 gains 0.2, 2 loses 0.1.
    Position 1: the target 1 gains 0.3, so nothing of it is in a sum.
    Position 2: the target 3 loses 0.25, 0 gains it."""
    reference = [[0.6, 0.1, 0.2, 0.1], [0.4, 0.2, 0.2, 0.2], [0.25, 0.25, 0.2495, 0.2505]]
    policy = [[0.1, 0.5, 0.1, 0.3], [0.1, 0.5, 0.2, 0.2], [0.5, 0.25, 0.2495, 0.0005]]
    found = of_probabilities(policy, reference, [0, 1, 3])
    assert found.losses.tolist() == pytest.approx([0.5, -0.3, 0.25], abs=1e-6)
    assert found.gainer_ids[0].tolist() == [1, 3, 2] and found.gainer_ids[2, 0] == 0
    assert found.gainer_ref_probs[0].tolist() == pytest.approx([0.1, 0.1, 0.2], abs=1e-6)
    assert found.gainer_probs[0].tolist() == pytest.approx([0.5, 0.3, 0.1], abs=1e-6)
    assert found.gained.tolist() == pytest.approx([0.25, 0.4, -0.1, 0.2], abs=1e-6)
    assert found.noticed.tolist() == [1, 1, 0, 1]
    assert found.lost == pytest.approx(0.75, abs=1e-6)
    assert [(gain.token, gain.positions) for gain in largest_gains([found, found], 2)] == [(1, 2), (0, 2)]
    assert largest_gains([found, found], 2)[0].change == pytest.approx(0.8, abs=1e-6)
    assert [gain.token for gain in largest_gains([found], 9)] == [1, 0, 3]  # none that lost
    assert largest_gains([], 3) == ()


def test_a_vocabulary_with_few_others():
    found = of_probabilities([[0.1, 0.9]], [[0.8, 0.2]], [0])
    assert found.gainer_ids.tolist() == [[1]] and found.gained.tolist() == pytest.approx([0, 0.7], abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 9, 100])
def test_against_float64_in_chunks(monkeypatch, chunk_size):
    monkeypatch.setattr(module, "CHUNK_SIZE", 2 * chunk_size)
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 9, 8, generator=generator)
    weight, targets = torch.randn(50, 8, generator=generator), torch.randint(50, (9,), generator=generator)
    held, head_logits = [], module.head_logits
    monkeypatch.setattr(module, "head_logits", lambda h, w: held.append(len(h)) or head_logits(h, w))
    found = displacement_of(hidden, ref_hidden, weight, targets)
    assert max(held) <= chunk_size and sum(held) == 2 * 9
    probs, ref_probs = ((h.double() @ weight.double().T).softmax(1) for h in (hidden, ref_hidden))
    check(found, probs, ref_probs, targets.tolist())
    assert 0 < int((found.losses > 0).sum()) < 9


def check(found, probs: torch.Tensor, ref_probs: torch.Tensor, targets: list[int]) -> None:
    """Against (n, V) probabilities in float64, one number at a time."""
    gained, noticed = [0.0] * probs.shape[1], [0] * probs.shape[1]
    for t, target in enumerate(targets):
        delta = (probs[t] - ref_probs[t]).tolist()
        assert float(found.losses[t]) == pytest.approx(-delta[target], abs=2e-6)
        others = sorted((v for v in range(len(delta)) if v != target), key=lambda v: -delta[v])
        shown = found.gainer_ids[t].tolist()
        assert target not in shown and len(set(shown)) == 3
        assert [delta[v] for v in shown] == pytest.approx([delta[v] for v in others[:3]], abs=2e-6)
        assert found.gainer_probs[t].tolist() == pytest.approx(probs[t][shown].tolist(), abs=2e-6)
        assert found.gainer_ref_probs[t].tolist() == pytest.approx(ref_probs[t][shown].tolist(), abs=2e-6)
        if delta[target] < 0:
            for v in others:
                gained[v] += delta[v]
                noticed[v] += delta[v] >= module.NOTICED
    assert found.gained.tolist() == pytest.approx(gained, abs=2e-6)
    assert sum(abs(a - b) for a, b in zip(found.noticed.tolist(), noticed, strict=True)) <= 1  # on the bound
    assert found.lost == pytest.approx(sum(gained), abs=1e-5)


def test_half_precision_weights_are_multiplied_as_training_does():
    hidden, ref_hidden, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(20, 8).half()
    found = displacement_of(hidden, ref_hidden, weight, torch.zeros(4, dtype=torch.int64))
    probs, ref_probs = ((h.half() @ weight.T).float().softmax(1) for h in (hidden, ref_hidden))
    assert found.gainer_probs.dtype == torch.float32
    assert torch.allclose(found.losses, (ref_probs - probs)[:, 0], atol=1e-6)


def probabilities(policy, ids: list[int], start: int, *, trained: bool) -> torch.Tensor:
    """Hugging Face's own predictions of the tokens from `start` on, (n, V) in float64."""
    policy.dropout.disable()
    policy.activate(parent=True, trained=trained)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor(ids)[None]).logits[0].double()
    policy.activate(parent=True, trained=True)
    return logits[start - 1 : -1].softmax(1)


@pytest.mark.parametrize("layout", [*LAYOUTS, {"packing": True, "shape": SHAPE}])
def test_every_displaced_pair_is_what_plain_forwards_give(policy, layout):
    settings = dict(layout)
    shape = settings.pop("shape", None)
    method = replace(helpers.dpo(**settings), **({"shape": shape} if shape else {}))
    records = inspect_pairs(policy, method, pairs())
    for record, example in zip(records, pairs(), strict=True):
        assert (record.displacement is None) == (record.texts[0].numbers["log-ratio"] >= 0)
        if record.displacement is None:
            continue
        prompt, chosen = example.prompt_ids.tolist(), example.chosen_ids.tolist()
        probs, ref_probs = (
            probabilities(policy, [*prompt, *chosen], len(prompt), trained=trained) for trained in (True, False)
        )
        check(record.displacement, probs, ref_probs, chosen)
    assert 0 < sum(record.displacement is not None for record in records) < len(records)


def test_a_fresh_adapter_displaces_nothing(tiny_base):
    fresh = helpers.make_policy(tiny_base, randomize=False)
    assert all(record.displacement is None for record in inspect_pairs(fresh, helpers.dpo(), pairs()))


def said(inspection) -> str:
    stream = io.StringIO()
    print_inspection(inspection, Console(file=stream, width=400, highlight=False))
    return stream.getvalue()


def test_a_planted_token_is_named(tiny_base, pieces):
    """The adapter learns to predict one token everywhere: it took the probability, and every table says so."""
    policy, method, examples = helpers.make_policy(tiny_base, randomize=False), helpers.dpo(), pairs()
    assert all(PLANTED not in example.chosen_ids for example in examples)
    helpers.push_mass(policy, method, examples, PLANTED)
    records = inspect_pairs(policy, method, examples)
    found = [record.displacement for record in records if record.displacement]
    assert len(found) == len(records)
    best = largest_gains(found, 5)[0]
    positions = sum(len(example.chosen_ids) for example in examples)
    fell = sum(int((one.losses > 0).sum()) for one in found)
    assert best.token == PLANTED and fell > 0.8 * positions
    assert best.change > 0.8 * fell and best.positions > 0.9 * fell
    inspection = inspection_of_pairs(policy, pieces, examples)
    text, page = said(inspection), render_page(inspection)
    assert text.count("displaced: the chosen is ") == page.count("<strong>Displaced:</strong>") == len(records)
    for record in records:
        line = fall_line(record, pieces)
        assert line.gainers[0][0] == pieces.text(PLANTED) and line.sentence in text
        i = int((record.texts[0].columns["policy"] - record.texts[0].columns["reference"]).argmin())
        assert line.position == str(len(record.prompt_ids) + i)
        assert line.token == pieces.text(int(record.texts[0].token_ids[i]))
        before, after = (float(share.strip("<%")) for share in re.split(" → ", line.gainers[0][1]))
        assert after > 50 > before
        assert float(line.ref_logp) == pytest.approx(float(record.texts[0].columns["reference"][i]), abs=6e-5)
        assert float(line.fell) == pytest.approx(-float(record.texts[0].numbers["log-ratio"]), abs=6e-5)


def test_what_is_not_displaced_has_no_line(policy, pieces):
    inspection = inspection_of_pairs(policy, pieces)
    displaced = [record for record in inspection.examples if record.displacement]
    assert 0 < len(displaced) < len(inspection.examples)
    assert said(inspection).count("displaced: ") == len(displaced)
    assert render_page(inspection).count('<p class="displaced">') == len(displaced)
