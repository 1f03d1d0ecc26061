"""The dequantising kernel in Triton's interpreter, against its twin, which other tests compare with bitsandbytes."""

import bitsandbytes as bnb
import pytest
import torch
from interpreter import HALF, SINGLE, interpreted

from lowlevel.kernels.dequantize import WORDS, Quantised, _launch, dequantize_reference

# A last program with few words; blocks that end within a program and beyond it; more constants than a block of them.
SIZES = [((3, 64), 64), ((5, 72), 64), ((33, 192), 128), ((72, 64), 1024), ((300, 64), 64)]


@interpreted
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("shape", "blocksize"), SIZES)
def test_interpreted_kernel_gives_its_twins_bits(shape, blocksize, dtype, nested, kind):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    values[0] *= 100
    weight = Quantised.of(
        *bnb.functional.quantize_4bit(values, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
    )
    assert torch.equal(_launch(weight, dtype), dequantize_reference(weight, dtype))


def test_the_sizes_need_one_program_and_several():
    words = [shape[0] * shape[1] // 8 for shape, _ in SIZES]
    assert min(words) < WORDS < max(words)
