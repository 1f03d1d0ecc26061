"""Other architectures: the fast sampler gives what Hugging Face's generate gives, or says why it does not take them."""

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowlevel.config.schema import LoraConfig
from lowlevel.model.base import _freeze
from lowlevel.model.build import build_policy
from lowlevel.sampling import FastSampler, PlainSampler, Sampling, build_sampler

SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "pad_token_id": 0}  # fmt: skip
HEADS = {**SIZES, "head_dim": 16}
TAKEN = {
    "qwen2": SIZES,
    "qwen3": HEADS,
    "gemma": HEADS,
    "mistral": {**SIZES, "sliding_window": 40},
    "gpt_neox": SIZES,
    "granite": SIZES,
    "starcoder2": SIZES,
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phimoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
NOT_TAKEN = {
    "lfm2": ({**SIZES, "full_attn_idxs": [1], "block_ff_dim": 96}, "sampling by Hugging Face's generate, which"),
    "gpt_oss": ({**HEADS, "num_local_experts": 2, "num_experts_per_tok": 1}, "the base's attention has s_aux"),
    "falcon": ({**SIZES, "multi_query": False, "bias": True}, "(falcon) takes no other attention"),
}


def model_of(family, settings):
    torch.manual_seed(0)
    attention = "eager" if family == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), attn_implementation=attention)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    _freeze(model.eval())
    return model


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 190, size).tolist() for size in (9, 1, 14)]


@pytest.mark.parametrize("family", TAKEN)
def test_families_that_are_taken(family):
    model = model_of(family, TAKEN[family])
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    lora = LoraConfig(r=2, target_modules=tuple(sorted(linear - {"lm_head", "embed_out", "router", "gate"})))
    policy = build_policy(model, lora, CPU, seed=0)
    helpers.fill_lora_b(policy)
    assert isinstance(build_sampler(policy.model, CPU, [5], pytest.fail), FastSampler)
    fast, plain = FastSampler(policy.model, CPU, [5], join=True), PlainSampler(policy.model, CPU, [5])
    for mine, theirs in zip(*(one.sample(prompts(), Sampling(12)) for one in (fast, plain)), strict=True):
        assert mine[0].ids.tolist() == theirs[0].ids.tolist()
        np.testing.assert_allclose(mine[0].logps, theirs[0].logps, atol=1e-4)


@pytest.mark.parametrize("family", NOT_TAKEN)
def test_families_that_are_not_taken(family):
    settings, line = NOT_TAKEN[family]
    said = []
    sampler = build_sampler(model_of(family, settings), CPU, [5], said.append)
    assert isinstance(sampler, PlainSampler)
    assert len(said) == 1 and line in said[0]
    assert len(sampler.sample(prompts(), Sampling(3))) == 3


def test_beyond_its_window_a_base_samples_by_its_own_code():
    model, said = model_of("mistral", TAKEN["mistral"]), []
    fast, plain = FastSampler(model, CPU, [5], said.append), PlainSampler(model, CPU, [5])
    found, expected = (one.sample(prompts(), Sampling(40)) for one in (fast, plain))
    assert [one[0].ids.tolist() for one in found] == [one[0].ids.tolist() for one in expected]
    assert said == ["sampling: 54 tokens exceed the base's window of 40: by Hugging Face's generate, which is slower"]


def test_a_prompt_beyond_the_bases_positions_is_said_once():
    said = []
    sampler = FastSampler(model_of("qwen2", SIZES), CPU, [5], said.append)
    for size in (512, 513, 513):  # the model has 512 positions
        sampler.sample([[7] * size], Sampling(1))
    assert said == ["sampling: a prompt of 513 tokens is longer than the base's 512 positions"]
