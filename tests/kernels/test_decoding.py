"""Attention over a cache: the twin against plain softmax attention in float64, and the kernel against its twin."""

import pytest
import torch
from interpreter import HALF, INTERPRETED, SINGLE, interpreted

from lowlevel.kernels import decoding

SHAPES = [(3, 8, 4, 16, 256), (2, 14, 2, 80, 768), (2, 1, 1, 64, 2304)]  # rows, heads, heads of keys, features, C
shapes = pytest.mark.parametrize("shape", SHAPES)


def inputs(shape, dtype):
    """Row 0 has no token yet, row 1 ends a chunk; the cache holds what other sequences left."""
    rows, heads, kv_heads, features, capacity = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((rows, heads, features), (rows, kv_heads, features), (rows, kv_heads, features),
             (2, rows + 1, kv_heads, capacity, features))  # fmt: skip
    query, key, value, cache = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    positions = torch.randint(capacity, (rows,), generator=generator)
    positions[0], positions[1] = 0, 63
    return query, key, value, cache, positions, features**-0.5


@shapes
def test_attention_over_the_cache_in_float64(shape):
    query, key, value, cache, positions, scale = inputs(shape, SINGLE)
    before = cache.clone()
    found = decoding.decode_attention(query, key, value, cache, positions, scale)
    for row, position in enumerate(positions.tolist()):
        assert torch.equal(cache[0, row, :, position], key[row]) and torch.equal(cache[1, row, :, position], value[row])
        before[:, row, :, position] = cache[:, row, :, position]
        repeats = query.shape[1] // key.shape[1]
        keys, values = cache[:, row, :, : position + 1].double().repeat_interleave(repeats, 1)
        weights = (torch.einsum("hd,hcd->hc", query[row].double(), keys) * scale).softmax(-1)
        expected = torch.einsum("hc,hcd->hd", weights, values)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache, before), "nothing else is written"


@interpreted
@shapes
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_interpreted_decode_attention_against_its_twin(shape, dtype):
    query, key, value, cache, positions, scale = inputs(shape, dtype)
    twin = cache.clone()
    expected = decoding.decode_attention_reference(query, key, value, twin, positions, scale)
    found = decoding.launch(query, key, value, cache, positions, scale)
    assert torch.equal(cache, twin)
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == SINGLE else 1e-3, rtol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="needs the tests' settings")
def test_the_operators_are_what_torch_expects_of_operators():
    query, key, value, cache, positions, scale = inputs(SHAPES[0], SINGLE)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(decoding.decode_attention, (query, key, value, cache, positions, scale), test_utils=utils)
    torch.library.opcheck(decoding.store, (cache, key, value, positions // 200, positions), test_utils=utils)
