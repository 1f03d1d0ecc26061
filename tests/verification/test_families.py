"""Bases of other families: what the float64 pass computes is what the family's own code says, its logits included."""

import shutil

import pytest
import torch
from helpers import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

from lowlevel.model import suitability
from lowlevel.verification import run_checks

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "phi": SIZES,
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 64},
}


@pytest.fixture
def subject(make, space, tmp_path):
    """A subject over a random base of a family; `change(model)` before it is saved."""

    def of(family, change=lambda model: None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.12)
            change(model)
        model.save_pretrained(tmp_path / family)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(space.base / name, tmp_path / family)
        lora = {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_dropout": 0.0}
        return make("sft", examples=2, model={"name": str(tmp_path / family), "load_in_4bit": False}, lora=lora)

    return of


def failures(subject) -> set[str]:
    return {f"{check.group}: {check.name}" for check in run_checks(subject) if not check.ok}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_holds(subject, family):
    assert failures(subject(family)) == set()


def test_a_bias_of_the_lm_head_that_is_let_through_is_seen(subject, monkeypatch):
    monkeypatch.setattr(suitability, "_check_lm_head", lambda *arguments: None)
    found = failures(subject("phi", lambda model: model.lm_head.bias.normal_(std=0.01)))
    assert {"loss: forward pass, policy", "loss: its worst token, policy"} <= found
