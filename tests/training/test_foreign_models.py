"""Models of other families: either a packed token computes what the model alone computes, or the base is refused."""

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowlevel.batch.layout import build_batch
from lowlevel.batch.segments import prompt_segment, sft_segment
from lowlevel.config.schema import LoraConfig
from lowlevel.errors import ConfigError
from lowlevel.model.adapters import read_adapter_config, save_adapter, write_adapter
from lowlevel.model.attention_choice import MASKED, NAMES, Attention, register
from lowlevel.model.base import _freeze
from lowlevel.model.build import build_policy
from lowlevel.model.policy import TRAINED
from lowlevel.model.suitability import attention_window, short_positions

SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "pad_token_id": 0}  # fmt: skip
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "head_dim": 16,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "gemma": {**SIZES, "head_dim": 16},
    "mistral": {**SIZES, "sliding_window": 40},
    "gpt_neox": SIZES,
    "granite": {**SIZES, "attention_dropout": 0.1},
    "seed_oss": {**SIZES, "head_dim": 16, "attention_dropout": 0.1, "residual_dropout": 0.1},
    "starcoder2": {**SIZES, "residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.1},
    "phimoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "input_jitter_noise": 0.1},
    "lfm2": {**SIZES, "full_attn_idxs": [1], "block_ff_dim": 96},
    "qwen3_5_text": {**SIZES, **LINEAR},
    "qwen3_moe": {**SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {**SIZES, "head_dim": 16, "sliding_window": 200, "num_local_experts": 2, "num_experts_per_tok": 1},
}

DROPPING = ["granite", "seed_oss", "starcoder2", "opt", "phimoe"]  # which would draw random numbers in training mode
TAKEN = ["llama", "qwen2", "qwen3", "gemma", "mistral", "gpt_neox", *DROPPING]


def model_of(family, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **FAMILIES[family]), attn_implementation=attention
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    _freeze(model.eval())
    return model


def policy_of(family, kernel):
    register()
    attention = Attention(NAMES["math"], "") if kernel == "spans" else Attention("sdpa", "")
    return policy_over(model_of(family, attention.implementation), attention)


def policy_over(model, attention=MASKED):
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = tuple(sorted(linear - {"lm_head", "embed_out", "router"}))
    return build_policy(model, LoraConfig(r=2, target_modules=targets), CPU, seed=0, attention=attention)


def own_logps(family, ids):
    """As the family's own code computes them: (L - 1,)."""
    with torch.no_grad():
        logits = model_of(family)(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("kernel", ["mask", "spans"])
@pytest.mark.parametrize("family", TAKEN)
def test_families_that_are_taken_compute_packed_what_they_compute_alone(family, kernel):
    policy, draw = policy_of(family, kernel), np.random.default_rng(0)
    first, second = (draw.integers(3, 190, size=n) for n in (40, 29))
    rows = build_batch([[sft_segment(i, i, ids, ids) for i, ids in enumerate((first, second))]], pairs=False)
    pair = build_batch([[prompt_segment(0, 0, first[:9], {1: first[9:], 2: second[9:]})]], pairs=True)
    with torch.no_grad():
        packed, shared = policy.token_logps(rows), policy.token_logps(pair)
    torch.testing.assert_close(
        packed, torch.cat([own_logps(family, ids) for ids in (first, second)]), rtol=0, atol=1e-4
    )
    rejected = np.concatenate([first[:9], second[9:]])
    expected = torch.cat([own_logps(family, ids)[8:] for ids in (first, rejected)])
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kernel", "what"),
    [
        ("lfm2", "mask", "examples that share a row change each other"),
        ("qwen3_5_text", "mask", "examples that share a row change each other"),
        ("gpt_oss", "spans", "the base's attention has s_aux"),
    ],
)
def test_families_that_join_tokens_otherwise_are_refused(family, kernel, what):
    with pytest.raises(ConfigError, match=what):
        policy_of(family, kernel)


def test_a_model_that_draws_random_numbers_is_refused():
    """The eval mode of the base reaches its own dropouts and routers, and not what draws in any mode."""
    model = model_of("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: nn.functional.dropout(output, 0.1))
    with pytest.raises(ConfigError, match="two equal passes differ"):
        build_policy(model, LoraConfig(r=2), CPU, seed=0)


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("llama", {}, None),
        ("llama", {"sliding_window": 512, "use_sliding_window": False}, None),  # keys that are left of another family
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 1}, 512),
        ("phi3", {"sliding_window": 2047}, 2047),
        ("gemma3_text", {"sliding_window": 512}, 512),
        ("llama4_text", {"attention_chunk_size": 8192}, 8192),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 256}, 256),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global"], 2]], "window_size": 256}, None),
    ],
)
def test_the_attention_window_of_a_configuration(family, settings, window):
    assert attention_window(AutoConfig.for_model(family, **settings)) == window


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings", "positions"),
    [
        ("llama", {}, None),
        ("phi3", {"rope_parameters": LONGROPE}, 4096),
        ("phi3", {"rope_parameters": None, "rope_scaling": {**LONGROPE, "type": "longrope"}}, 4096),  # older files
        ("gemma3_text", {}, None),  # rope parameters by kind of layer
    ],
)
def test_the_positions_up_to_which_longrope_is_the_same_for_every_batch(family, settings, positions):
    config = AutoConfig.for_model(family, original_max_position_embeddings=4096, **settings)
    assert short_positions(config) == positions


@pytest.mark.parametrize("family", DROPPING)
def test_a_step_of_a_base_that_would_drop_is_the_same_each_time_and_its_reference_is_the_policy(family):
    policy, pairs = policy_of(family, "mask"), helpers.ragged_pairs(4)
    pairs = [helpers.Pair(x.row, *(ids % 200 for ids in (x.prompt_ids, x.chosen_ids, x.rejected_ids))) for x in pairs]
    results = [helpers.step(policy, helpers.dpo(packing=True), pairs) for _ in range(2)]
    assert results[0].metrics == results[1].metrics and results[0].grad_norm == results[1].grad_norm > 0
    assert results[0].metrics["rewards/margins"] == 0.0 and results[0].metrics["rewards/accuracies"] == 0.5


def test_the_adapter_of_a_mixture_of_experts_is_opened_here_and_by_peft(tmp_path):
    """PEFT 0.21 puts an empty set into target_parameters there; `str` made it the text 'set()'."""
    policy = policy_of("qwen3_moe", "mask")
    save_adapter(policy.model, TRAINED, tmp_path, "base")
    assert read_adapter_config(tmp_path).target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    opened = PeftModel.from_pretrained(model_of("qwen3_moe"), tmp_path)
    found = {name: p for name, p in opened.named_parameters() if ".lora_" in name}
    assert len(found) == len(policy.flat.views) == 16


def test_a_setting_that_json_has_no_form_for_is_not_written_as_its_text(tmp_path):
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "adapter", {}, {"target_modules": {"q_proj"}, "odd": object()})
    assert not (tmp_path / "adapter").exists()
