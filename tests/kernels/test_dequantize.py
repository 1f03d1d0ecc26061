"""4-bit weights: the twin against bitsandbytes' own numbers, bit for bit, and the compiled layer's gradient."""

from contextlib import nullcontext

import bitsandbytes as bnb
import helpers
import pytest
import torch

from lowlevel.config.schema import ModelConfig
from lowlevel.errors import ConfigError
from lowlevel.kernels.dequantize import Quantised, dequantize, dequantize_reference
from lowlevel.model import base_checks
from lowlevel.model.base import load_base
from lowlevel.model.linear import FrozenLinear4bit, install_dequantising_products
from lowlevel.model.placement import Placement

CPU = Placement(torch.device("cpu"), "fp32")
SHAPES = [(64, 64), (3, 64), (2, 2), (5, 66), (257, 192), (512, 1024)]
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])
nesting = pytest.mark.parametrize("nested", [True, False])


def quantised(shape: tuple[int, int], kind: str, nested: bool, dtype: torch.dtype, blocksize: int = 64):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)
    values[0] *= 100  # constants of many sizes
    return bnb.functional.quantize_4bit(
        values.to(dtype), quant_type=kind, compress_statistics=nested, blocksize=blocksize
    )


@kinds
@nesting
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_gives_bitsandbytes_numbers(shape, dtype, nested, kind):
    """Bit for bit in fp32; in fp16 bitsandbytes rounds otherwise on some CPUs (one unit, seen with AVX-512)."""
    packed, state = quantised(shape, kind, nested, dtype)
    expected = bnb.functional.dequantize_4bit(packed, state)
    found = dequantize_reference(Quantised.of(packed, state), dtype)
    unit = 2**-10 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(found, expected, rtol=unit, atol=0.0)
    assert torch.equal(dequantize(Quantised.of(packed, state), dtype), found)  # on a CPU, the twin


@pytest.mark.parametrize("blocksize", [64, 128, 1024])  # above, bitsandbytes compiles its own: 20 seconds
def test_blocks_of_other_sizes(blocksize):
    packed, state = quantised((4, 4096), "nf4", True, torch.float32, blocksize)
    found = dequantize(Quantised.of(packed, state), torch.float32)
    assert torch.equal(found, bnb.functional.dequantize_4bit(packed, state))


def layer(nested: bool, bias: bool = False) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(
        128, 40, bias=bias, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    ).to("cpu")
    made.support_avx512bf16_for_cpu = False
    return made.requires_grad_(False)


@nesting
@pytest.mark.parametrize("bias", [False, True])
def test_the_compiled_layer_equals_bitsandbytes_own_in_output_and_gradient(nested, bias):
    own = layer(nested, bias)
    x = torch.randn(2, 7, 128, requires_grad=True)
    expected = own(x)
    direction = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, direction)
    model = torch.nn.Sequential(own)
    install_dequantising_products(model)
    assert type(model[0]) is FrozenLinear4bit and isinstance(model[0], bnb.nn.Linear4bit)
    assert torch.equal(model(x), expected)  # uncompiled: the same code

    calls = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: calls.append(str(graph.code)) or graph)
    found = compiled(x)
    (grad,) = torch.autograd.grad(found, x, direction)
    assert "lowlevel.adapted_linear" in calls[0]  # the compiled layer is ours
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_this_cpu_is_asked_whether_it_reads_ragged_rows():
    """Blocks of 64 that go over the end of a row: with AVX-512 bitsandbytes 0.50.2 reads them wrongly."""
    packed, state = quantised((40, 96), "nf4", True, torch.float32)
    found = bnb.functional.dequantize_4bit(packed, state)
    right = torch.equal(found, dequantize_reference(Quantised.of(packed, state), torch.float32))
    assert base_checks._reads_ragged_rows() == right


@pytest.mark.parametrize("wrong", [False, True])
def test_weights_that_bitsandbytes_reads_wrongly_are_refused(tmp_path, monkeypatch, wrong):
    helpers.write_tiny_base(tmp_path / "narrow", hidden_size=96)
    if wrong:  # as with AVX-512
        right = bnb.functional.dequantize_4bit
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *a, **k: right(*a, **k).flip(0))
    else:
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda p, s: dequantize_reference(Quantised.of(p, s),
                                                                                              s.dtype))  # fmt: skip
    base_checks._reads_ragged_rows.cache_clear()
    try:
        load_base(ModelConfig(name=str(tmp_path / "narrow"), load_in_4bit=False), CPU)
        with pytest.raises(ConfigError, match="q_proj has 96 inputs, not a multiple of 64") if wrong else nullcontext():
            load_base(ModelConfig(name=str(tmp_path / "narrow")), CPU)
    finally:
        base_checks._reads_ragged_rows.cache_clear()
