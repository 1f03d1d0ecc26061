"""Log-likelihoods on shared and packed rows against a plain Hugging Face forward pass of each request alone."""

import pytest
import torch
from helpers import VOCABULARY, make_policy

from lowlevel.batch.beginnings import by_beginning
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


def few_shot_requests() -> list[tuple[list[int], list[int]]]:
    """Two tasks, whose contexts begin with 17 and 18 tokens that are the same in all of them."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for shots in (list(range(3, 20)), list(range(9, 27))):
        for items in range(7):
            own = torch.randint(3, VOCABULARY, (1 + items % 3,), generator=draw).tolist()
            found += [([*shots, *own], [5 + items, *range(3, 3 + choice)]) for choice in range(3)]
    return found[::2] + found[1::2]


@pytest.mark.parametrize("positions", [8192, 48])
@pytest.mark.parametrize("attention", ["sdpa", "lowlevel_math"])
@pytest.mark.parametrize("make", [ragged_requests, few_shot_requests])
def test_same_as_each_alone(tiny_base, monkeypatch, make, attention, positions):
    monkeypatch.setitem(continuations.POSITIONS, "cpu", positions)
    requests = make()
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


def test_contexts_by_beginning():
    """Few-shot examples are shared by the items of a task; a context alone, or half of each prompt, is not shared."""
    contexts = [context for context, _ in few_shot_requests()]
    others = [[9, 1, 1], *[[*range(30, 40), i, *range(9)] for i in (1, 2)]]
    (one, first), (other, second), rest = by_beginning([*contexts, *others])
    assert {one, other} == {17, 18} and rest == (0, [42, 43, 44])
    for length, group in ((one, first), (other, second)):
        assert len(group) == 21 and all(contexts[i][:length] == contexts[group[0]][:length] for i in group)
    left = [[*range(6), *own] for own in ([], [7], [8], [9])]
    assert list(by_beginning(left)) == [(5, [0, 1, 2, 3])]  # one token is left
    assert list(by_beginning([])) == []


def test_continuations_that_no_row_holds_are_divided(tiny_base, monkeypatch):
    requests = [([1, 2, 3, 4], [5 + i, 6]) for i in range(20)]
    expected, policy = likelihoods(make_policy(tiny_base), requests, 64), make_policy(tiny_base)
    monkeypatch.setitem(continuations.POSITIONS, "cpu", 16)
    made = list(continuations.batches_of(policy, requests))
    assert len(made) == 4 and max(one.batch.input_ids.numel() for one in made) <= 16
    assert sorted(place for one in made for place in one.places) == list(range(20))
    for one, two in zip(likelihoods(policy, requests, 64), expected, strict=True):
        assert one.logp == pytest.approx(two.logp, abs=1e-5)


def test_shared_contexts_are_computed_once(tiny_base):
    requests = [([1, 2, 3, 4], [5]), ([9, 2], [6, 7]), ([1, 2, 3, 4], [8, 8]), ([7], [1]), ([7], [2])]
    (made,) = continuations.batches_of(make_policy(tiny_base), requests)
    assert made.batch.num_tokens == (3 + 1 + 2) + (1 + 2) + 1 + 1 and made.places == [0, 2, 1, 3, 4]
    assert len(made.batch.span_queries) - 1 == 2 + 1 + 1 + 1 + (made.batch.num_tokens % 8 > 0)
