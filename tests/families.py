"""Random bases of other families on disk, with the tiny base's tokenizer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def nothing(model: Any) -> None:
    """No change."""


def write_family(
    folder: Path, family: str, settings: dict[str, Any], tokenizer: Path, change: Callable[[Any], None] = nothing
) -> Path:
    """Save a model of `settings`, after `change(model)`, and the tokenizer of another folder; returns the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
        change(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    return folder
