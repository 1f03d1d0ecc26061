"""Log-likelihoods of continuations on a GPU's packed rows, by kernels without a mask: those of the masked rows."""

import pytest
import torch
from helpers import CPU, VOCABULARY, make_policy

from lowlevel.evaluation.continuations import likelihoods
from lowlevel.model.placement import Placement

GPU = Placement(torch.device("cuda"), "fp16")
SINGLE = Placement(torch.device("cuda"), "fp32")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def questions(count: int, shots: int = 0) -> list[tuple[list[int], list[int]]]:
    """Questions of 2 to 60 tokens with 1 to 5 choices of 1 to 6, after the same `shots` tokens."""
    draw = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(3, VOCABULARY, (size,), generator=draw).tolist()

    contexts = [[*(5 + i % 90 for i in range(shots)), *ids(2, 60)] for _ in range(count)]
    return [(context, ids(1, 6)) for number, context in enumerate(contexts) for _ in range(1 + number % 5)]


@pytest.mark.parametrize(
    ("attention", "placement", "nats"),
    [
        ("lowlevel_math", CPU, 2e-5),
        pytest.param("lowlevel_efficient", SINGLE, 1e-4, marks=NEEDS_GPU),
        pytest.param("lowlevel_efficient", GPU, 0.05, marks=NEEDS_GPU),
        pytest.param("lowlevel_fa2", GPU, 0.05, marks=NEEDS_GPU),
    ],
)
def test_packed_as_masked(tiny_base, attention, placement, nats):
    requests = questions(20) + questions(12, shots=150)
    plain = make_policy(tiny_base)
    expected = [likelihoods(plain, [request], 256)[0] for request in requests]  # alone, none shares anything
    found = likelihoods(make_policy(tiny_base, attention=attention, placement=placement), requests, 256)
    assert max(abs(one.logp - two.logp) for one, two in zip(found, expected, strict=True)) < nats
