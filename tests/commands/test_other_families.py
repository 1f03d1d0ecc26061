"""Bases of other families through the command line: those that are taken, and what is said of those that are not."""

import pytest
from families import EXPERTS, SIZES, write_family
from refusals import refused

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


OLD = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip
FALCON = {**SIZES, "multi_query": False, "alibi": True, "bias": True}
UNSUPPORTED = {
    "gpt2": (OLD, ["c_attn"], "GPT2LMHeadModel is not supported: it has no linear layers to adapt"),
    "bloom": (
        {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        ["query_key_value"],
        "this architecture (bloom) is not supported: its configuration has no max_position_embeddings",
    ),
    "gpt_bigcode": (
        OLD,
        ["c_attn"],
        "this architecture (gpt_bigcode) is not supported: its first pass ends with TypeError: "
        "its layers take 2 positional arguments; only one is supported",
    ),
    "falcon": (FALCON, ["query_key_value"], "this architecture (falcon) is not supported: its first pass ends with "),
    "gptj": (
        {**OLD, "rotary_dim": 8},
        ["q_proj"],
        'this architecture (gptj) only supports eager attention; set model.attn_implementation = "eager"',
    ),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_an_architecture_that_is_not_supported_is_told_by_name(cli, config, family):
    settings, targets, line = UNSUPPORTED[family]
    file = config(family, targets=targets, settings=settings, model={"load_in_4bit": False})
    refused(cli("sft", file), 2, line)


def test_a_setting_that_the_message_names_is_enough(cli, config, tmp_path):
    """A run with eager attention, whose merged model and replies are asked of the same family."""
    file = config("gptj", targets=["q_proj", "fc_in"], settings={**OLD, "rotary_dim": 8}, model={"load_in_4bit": False})
    assert cli("sft", file, "--model.attn_implementation", "eager").code == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    replies = ["--max-new-tokens", 2, "--prompt", "hi"]
    for command in (["verify", run], ["merge", run, "--out", merged], ["generate", run, *replies],
                    ["generate", merged, *replies]):  # fmt: skip
        said = cli(*command)
        assert said.code == 0, (command, said.err)


def test_plan_names_the_size_that_a_configuration_lacks(cli, config):
    settings = {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}
    del settings["intermediate_size"]
    file = config("opt", targets=["q_proj"], settings=settings)
    refused(
        cli("plan", file), 2, "this architecture (opt) is not supported: its configuration has no intermediate_size"
    )
