"""Log-likelihoods on shared and packed rows against a plain Hugging Face forward pass of each request alone."""

import pytest
import torch
from helpers import VOCABULARY, make_policy

from lowlevel.evaluation import continuations
from lowlevel.evaluation.continuations import likelihoods

MAX_LENGTH = 24


def ragged_requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Questions with 1 to 5 choices, in an order that mixes them; some are too long, one context has one token."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(3, VOCABULARY, (size,), generator=draw).tolist()

    contexts = [[5], *(ids(2, 30) for _ in range(7))]
    requests = [(context, ids(1, 8)) for number, context in enumerate(contexts) for _ in range(1 + number % 5)]
    return [requests[i] for i in torch.randperm(len(requests), generator=draw)]


@torch.no_grad()
def alone(policy, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    inputs = (context + continuation)[-(MAX_LENGTH + 1) :]
    logits = policy.causal_lm(torch.tensor([inputs[:-1]])).logits[0, -len(continuation) :].double()
    targets = torch.tensor(continuation)
    logps = logits.log_softmax(1).gather(1, targets[:, None])
    return float(logps.sum()), bool((logits.argmax(1) == targets).all())


@pytest.mark.parametrize("positions", [8192, 48])
@pytest.mark.parametrize("attention", ["sdpa", "lowlevel_math"])
def test_same_as_each_alone(tiny_base, monkeypatch, attention, positions):
    monkeypatch.setitem(continuations.POSITIONS, "cpu", positions)
    requests = ragged_requests()
    plain = make_policy(tiny_base)
    expected = [alone(plain, *request) for request in requests]
    greedy = plain.causal_lm(torch.tensor([requests[0][0][-10:]])).logits[0, -1].argmax()
    requests.append((requests[0][0][-10:], [int(greedy)]))
    expected.append(alone(plain, *requests[-1]))
    assert expected[-1][1]
    found = likelihoods(make_policy(tiny_base, attention=attention, dropout=0.5), requests, MAX_LENGTH)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    assert max(abs(one.logp - logp) for one, (logp, _) in zip(found, expected, strict=True)) < 2e-5
    assert likelihoods(plain, [], MAX_LENGTH) == []


def test_shared_contexts_are_computed_once():
    requests = [([1, 2, 3, 4], [5]), ([9, 2], [6, 7]), ([1, 2, 3, 4], [8, 8])]
    parts = continuations._shared(requests, MAX_LENGTH, 100)
    assert [(len(part), part.places) for part in parts] == [(3 + 1 + 2, [0, 2]), (1 + 2, [1])]
