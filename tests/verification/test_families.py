"""Bases of other families: what the float64 pass computes is what the family's own code says, its logits included."""

import pytest
from families import EXPERTS, SIZES, nothing, write_family

from lowlevel.model import suitability
from lowlevel.verification.report import run_checks

FAMILIES = {
    "phi": SIZES,
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.1, "pad_token_id": 1},
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 64},
}


@pytest.fixture
def subject(make, space, tmp_path):
    """A subject over a random base of a family; `change(model)` before it is saved."""

    def of(family, change=nothing):
        base = write_family(tmp_path / family, family, FAMILIES[family], space.base, change)
        lora = {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_dropout": 0.0}
        return make("sft", examples=2, model={"name": str(base), "load_in_4bit": False}, lora=lora)

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
