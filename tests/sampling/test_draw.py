"""Drawing tokens by counter: the right distribution, and noise that depends on key, position and token alone."""

import math

import pytest
import torch

from lowlevel.sampling.draw import draw, gumbel, token_keys

DRAWS = 40_000
CHI_SQUARE_6 = 27.86  # exceeded with probability 1e-4 at 6 degrees of freedom
KOLMOGOROV = 2.225  # sqrt(log(2 / 1e-4) / 2): the same of the largest distance between two laws, times sqrt(n)
CPU = torch.device("cpu")


def keys(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (number,), generator=generator).to(torch.int32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_those_of_softmax(temperature):
    """Chi-square over completions, and over the positions of one completion."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -3.0, 1.0])
    expected = DRAWS * torch.softmax(logits.double() / temperature, 0)
    words, rows = token_keys(7, CPU), logits.expand(DRAWS, 7)
    one, first = torch.full((DRAWS,), 77, dtype=torch.int32), torch.zeros(DRAWS, dtype=torch.int32)
    for own, positions in ((keys(DRAWS), first), (one, torch.arange(DRAWS, dtype=torch.int32))):
        tokens, logps = draw(rows, temperature, own, positions, words)
        assert ((tokens.bincount(minlength=7) - expected).square() / expected).sum() < CHI_SQUARE_6
        assert logps.double() == pytest.approx((expected[tokens] / DRAWS).log(), abs=1e-6)


def test_noise_is_gumbel_and_finite():
    """Its law is exp(-exp(-g)): the largest distance to it, and the mean (Euler's constant) of a million numbers."""
    noise = gumbel(keys(32), torch.arange(32, dtype=torch.int32), token_keys(32_000, CPU)).flatten().double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * math.pi / math.sqrt(6 * len(noise)))
    steps = torch.arange(len(noise), dtype=torch.float64) / len(noise)
    assert (torch.exp(-torch.exp(-noise.sort().values)) - steps).abs().max() < KOLMOGOROV / len(noise) ** 0.5


def test_temperature_0_takes_the_likeliest_with_its_log_probability_at_1():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).half()
    tokens, logps = draw(logits, torch.tensor(0.0), keys(5), torch.zeros(5, dtype=torch.int32), token_keys(50, CPU))
    assert torch.equal(tokens, logits.argmax(1))
    assert torch.allclose(logps, logits.float().log_softmax(1).amax(1), atol=1e-6)
