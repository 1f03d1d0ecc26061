"""Several ranks compute what one computes, up to the order of additions; and the same bits on each rank."""

import json
from types import SimpleNamespace

import helpers
import pytest
import rank_cases
import torch
from rank_cases import KINDS, LAYOUTS, SAMPLED
from safetensors.torch import load_file

from lowlevel.batch.layout import Shape
from lowlevel.batch.packing import Layout, divide, micro_batch_rows
from lowlevel.config.schema import RunConfig
from lowlevel.hashing import checksum
from lowlevel.model.placement import Placement
from lowlevel.ranks import ALONE
from lowlevel.running.assembly import choose_execution

BOUND = 1e-6  # relative for losses and metrics; for elements of a gradient, and twice that for pairs and labels


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return tiny_base, helpers.write_stored_base(tiny_base, folder, bnb_4bit_quant_storage=torch.bfloat16)


@pytest.fixture(scope="module")
def alone(bases):
    return rank_cases.compute(*bases, ALONE)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, bases, tmp_path_factory):
    """The tensors and messages of each rank."""
    from benchmarks.faulting.ranks import at_once

    out = tmp_path_factory.mktemp("ranks")
    at_once(rank_cases.work, request.param, *bases, out)
    names = [out / f"{request.param}-{rank}" for rank in range(request.param)]
    return [(load_file(f"{name}.safetensors"), json.loads(name.with_suffix(".json").read_text())) for name in names]


def test_every_rank_has_the_same_bits(together):
    first = together[0][0]
    for found, _ in together[1:]:
        assert found.keys() == first.keys()
        # of a shared base, the first ranks have a part that is larger by the rest of the division
    assert [n for n in first if not (n.endswith("bytes of layers") or torch.equal(found[n], first[n]))] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_one_rank(alone, together, kind):
    wanted, found = alone[0], together[0][0]
    assert float(wanted[f"{kind} 8x1 gradient"].norm()) > 0.05
    for layout in LAYOUTS:
        name = f"{kind} {layout}"
        torch.testing.assert_close(found[f"{name} metrics"], wanted[f"{name} metrics"], rtol=BOUND, atol=BOUND)
        apart = (found[f"{name} gradient"] - wanted[f"{name} gradient"]).abs().max()
        assert apart <= (1 if kind == "sft" else 2) * BOUND, (name, float(apart))
        if kind in SAMPLED:
            assert torch.equal(found[f"{name} advantages"], wanted[f"{name} advantages"])  # no micro-batch was split


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_gathered_exactly(alone, together, kind):
    """Each micro-batch is computed by one rank, so what it gives is the same number."""
    values = [name for name in alone[0] if name.startswith(kind) and (" of " in name or "evaluation" in name)]
    assert len(values) > 2
    for name in values:
        torch.testing.assert_close(together[0][0][name], alone[0][name], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_an_overflow_of_one_rank_is_everyones(alone, together):
    assert together[0][0]["overflow scale"].tolist() == alone[0]["overflow scale"].tolist() == [2.0**14, 2]
    torch.testing.assert_close(together[0][0]["overflow gradient"], alone[0]["overflow gradient"], rtol=0, atol=1e-6)


def test_a_loss_that_is_nan_on_one_rank_ends_all_with_one_message(together):
    said = {messages["nan"] for _, messages in together}
    assert len(said) == 1 and f"step 1: loss is nan on rank {len(together) - 1}; nothing was updated" in said.pop()


def test_training_stays_close(alone, together):
    torch.testing.assert_close(
        together[0][0]["weights after 20 steps"], alone[0]["weights after 20 steps"], rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("kind", ["plain", "4-bit", "stored"])
def test_a_shared_base_gives_the_same_step(alone, together, kind):
    wanted, found = alone[0], together[0][0]
    names = [name for name in wanted if name.startswith("sharded") and kind in name]
    assert len(names) >= 5 and all(float(wanted[name].norm()) > 0.05 for name in names if name.endswith("gradient"))
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=BOUND, atol=2 * BOUND, equal_nan=True)
    for one in together:
        assert one[0][f"{kind} bytes of layers"] < 1.05 * wanted[f"{kind} bytes of layers"] / len(together)
        assert one[1][f"{kind} layers whole at once"] == "1"
        for what in ("sha256", "weights"):
            assert one[1][f"{kind} {what}"] == alone[1][f"{kind} {what}"]


def test_no_graph_is_captured_of_a_shared_base():
    """A captured pass could not be repeated on one GPU alone, so "auto" compiles."""
    on_gpu = {"placement": Placement(torch.device("cuda"), "fp16"), "attention": SimpleNamespace(kernel="x")}
    modes = [choose_execution(RunConfig(), SimpleNamespace(**on_gpu, shards=shards)) for shards in (None, ALONE)]
    assert modes == ["graphed", "compiled"]


def test_micro_batches_are_divided_by_load():
    assert divide([9, 1, 1, 1], 2) == [[0], [1, 2, 3]] and divide([9, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]]
    assert divide([5, 9, 1, 4], 2) == [[1, 2], [0, 3]]  # 9 + 1 and 5 + 4
    assert divide([3, 3, 3], 2) == [[0, 2], [1]]
    assert divide([7], 3) == [[0], [], []]


def test_packed_micro_batches_come_in_multiples_of_the_ranks():
    def packed(lengths, ranks):
        return micro_batch_rows(lengths, lambda length: length, Layout(None, 2, 64, True, Shape(8, 1, 64, 100, ranks)))

    lengths = [60, 50, 50, 40, 30]
    assert packed(lengths, 0) == [[[60, 40]], [[50, 50]], [[30]]]  # first fit decreasing
    assert packed(lengths, 1) == [[[60]], [[50, 40]], [[50, 30]]]  # as many, of about one size
    assert packed(lengths, 2) == [[[60]], [[50]], [[50]], [[40, 30]]]
    assert packed([60, 60, 60], 2) == [[[60]], [[60]], [[60]]]  # no fourth
    assert packed([100, 60, 40], 2) == [[[100]], [[60, 40]]]


def test_a_checksum_sees_any_bit_and_any_place():
    plain = torch.arange(10, dtype=torch.float32)
    swapped, bit = plain[[1, 0, *range(2, 10)]], plain.clone()
    bit.view(torch.int32)[7] ^= 1
    assert len({checksum([one]) for one in (plain, swapped, bit, plain[:9])}) == 4
    assert checksum([plain.to(torch.uint8)]) != checksum([swapped.to(torch.uint8)])
