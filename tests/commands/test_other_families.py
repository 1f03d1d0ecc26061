"""Bases of other families through the command line: those that are taken, and what is said of those that are not."""

import pytest
from families import EXPERTS, SIZES, write_family

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HEADS = {"head_dim": 64}
FAMILIES = {"qwen3_moe": {**SIZES, **HEADS, **EXPERTS}}


@pytest.fixture
def config(space, tmp_path):
    """A run file over a base of a family; `sections` go over it."""

    def of(family, method="sft", targets=ATTENTION, settings=None, **sections):
        base = write_family(tmp_path / "base", family, settings or FAMILIES[family], space.base)
        model = {"name": str(base), **sections.pop("model", {})}
        lora = {"r": 4, "target_modules": targets}
        train = {"max_steps": 1}
        return space.write("run", method, folder=tmp_path, model=model, lora=lora, train=train, **sections)

    return of


def test_a_mixture_of_experts_says_what_is_in_4_bits_and_its_adapter_opens(cli, config, tmp_path):
    said = cli("sft", config("qwen3_moe"))
    assert said.code == 0, said.err
    attention, experts = 2 * (64 * 256 * 2 + 64 * 128 * 2), 2 * 4 * 3 * 64 * 64
    other = 2 * (4 * 64 + 2 * 64 + 2 * 64) + 64  # routers, norms of heads and layers, the last norm
    total = attention + experts + other
    assert f"{attention / total:.0%} of the base is in 4 bits, {attention:,} of {total:,} weights" in said.out
    assert cli("verify", tmp_path / "run").code == 0


def test_a_base_that_is_nearly_all_in_4_bits_needs_no_note(runs):
    assert "of the base is in 4 bits" not in runs.said["sft"].out
