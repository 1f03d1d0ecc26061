"""The dequantisation kernel on a GPU against bitsandbytes' own kernels and the twin, bit for bit."""

import warnings

import bitsandbytes as bnb
import pytest
import torch

from lowlevel.kernels.dequantize import Quantised, _kernel_takes, dequantize, dequantize_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def no_fallback():
    """A test that fell back to plain torch would show nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="plain torch instead")
        yield


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 2), (3, 64), (5, 66), (7, 96), (257, 129), (2048, 5632)])
def test_the_kernel_gives_bitsandbytes_numbers_bit_for_bit(shape, dtype, nested, kind):
    values = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(sum(shape)), device="cuda")
    values[0] *= 100
    packed, state = bnb.functional.quantize_4bit(values.to(dtype), quant_type=kind, compress_statistics=nested)
    weight = Quantised.of(packed, state)
    assert _kernel_takes(weight, dtype) == (values.numel() % 8 == 0)
    found = dequantize(weight, dtype)
    assert torch.equal(found, bnb.functional.dequantize_4bit(packed, state))
    assert torch.equal(found, dequantize_reference(weight, dtype))


def test_it_can_be_captured_and_replayed():
    values = torch.randn(512, 1024, device="cuda")
    packed, state = bnb.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    weight = Quantised.of(packed, state)
    expected = dequantize(weight, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = dequantize(weight, torch.float16)
    graph.replay()
    assert torch.equal(found, expected)
