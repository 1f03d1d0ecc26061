"""Entropy, rank and alternatives, against numbers worked out by hand and in float64."""

import math

import pytest
import torch

import lowlevel.inspection.displacement as module
from lowlevel.inspection.displacement import distribution

# softmax of [2, 1, 0, -1]
P = [math.exp(z) / sum(math.exp(x) for x in (2, 1, 0, -1)) for z in (2, 1, 0, -1)]


def of_logits(logits: list[list[float]], targets: list[int], **keys):
    """A head whose logits are given: hidden states are unit vectors."""
    weight = torch.tensor(logits).T.contiguous()  # (V, N)
    return distribution(torch.eye(len(logits)), weight, torch.tensor(targets), **keys)


def test_by_hand():
    found = of_logits([[2.0, 1.0, 0.0, -1.0]] * 2, [0, 2])
    assert found.entropies.tolist() == pytest.approx([0.9475369, 0.9475369], abs=1e-6)
    assert -sum(p * math.log(p) for p in P) == pytest.approx(0.9475369, abs=1e-6)
    assert found.ranks.tolist() == [1, 3]
    assert found.alternative_ids.tolist() == [[1, 2, 3], [0, 1, 3]]
    assert found.alternative_logps.exp().flatten().tolist() == pytest.approx([*P[1:], P[0], P[1], P[3]], abs=1e-6)


def test_a_tie_counts_as_won_and_a_sure_prediction_has_no_entropy():
    found = of_logits([[0.0, 0.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0, 0.0]], [4, 0])
    assert found.ranks.tolist() == [1, 1]
    assert found.entropies.tolist() == pytest.approx([math.log(5), 0.0])


def test_a_vocabulary_with_few_others():
    assert of_logits([[1.0, 2.0, 3.0]], [2]).alternative_ids.tolist() == [[1, 0]]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_against_float64_in_chunks(monkeypatch, chunk_size):
    monkeypatch.setattr(module, "CHUNK_SIZE", chunk_size)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (7,), generator=generator)
    held = []
    linear = module.linear
    monkeypatch.setattr(module, "linear", lambda h, w: held.append(len(h)) or linear(h, w))
    found = distribution(hidden, weight, targets)
    assert max(held) <= chunk_size and sum(held) == 7
    logps = (hidden.double() @ weight.double().T).log_softmax(1)
    assert torch.allclose(found.entropies.double(), -(logps.exp() * logps).sum(1), atol=1e-5)
    for i, target in enumerate(targets.tolist()):
        order = logps[i].argsort(descending=True).tolist()
        assert found.ranks[i] == order.index(target) + 1
        assert found.alternative_ids[i].tolist() == [token for token in order if token != target][:3]


def test_half_precision_weights_are_multiplied_as_training_does():
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8).half()
    found = distribution(hidden, weight, torch.zeros(4, dtype=torch.int64))
    expected = (hidden.half() @ weight.T).float().log_softmax(1)
    assert found.entropies.dtype == torch.float32
    assert torch.allclose(found.entropies, -(expected.exp() * expected).sum(1), atol=1e-5)
