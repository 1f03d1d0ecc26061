"""The files in runs/ load and hold the recipe."""

from pathlib import Path

import pytest
from config_keys import value_of

from lowlevel.config.file import load_config
from lowlevel.config.schema import ALL_PROJECTIONS

RUNS = Path(__file__).parents[2] / "runs"
FILTERS = [
    {"column": "status", "op": "!=", "value": "tie"},
    {"column": "chosen_score", "op": ">=", "value": 8},
    {"column": "in_gsm8k_train", "op": "==", "value": False},
]
RECIPE_MODEL = {
    "model.name": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "model.load_in_4bit": True,
    "model.bnb_4bit_quant_type": "nf4",
    "model.bnb_4bit_use_double_quant": True,
    "lora.r": 64,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.1,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora.init_from": None,
    "data.chat_template_from": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "data.max_length": 512,
    "data.supervise": "all",
    "train.per_device_train_batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.optim": "paged_adamw_32bit",
    "train.lr_scheduler_type": "cosine",
    "train.warmup_steps": 0,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.precision": "fp16",
    "train.gradient_checkpointing": True,
    "train.logging_steps": 10,
    "train.data_order": "shuffled",
    "train.seed": 42,
}
RECIPE_SFT = {
    **RECIPE_MODEL,
    "data.source": "HuggingFaceH4/ultrachat_200k",
    "data.split": "test_sft",
    "data.shuffle_seed": 42,
    "data.limit": 3000,
    "data.format": "auto",
    "data.filters": [],
    "train.learning_rate": 2e-4,
    "train.warmup_ratio": 0.0,
    "train.max_steps": None,
    "train.num_train_epochs": 1,
}
RECIPE_DPO = {
    **RECIPE_MODEL,
    "model.adapter": "out/tinyllama_sft",
    "model.adapter_mode": "stack",
    "data.source": "argilla/distilabel-intel-orca-dpo-pairs",
    "data.split": "train",
    "data.shuffle_seed": None,
    "data.limit": None,
    "data.format": "orca",
    "data.filters": FILTERS,
    "data.max_prompt_length": 512,
    "train.learning_rate": 1e-5,
    "train.warmup_ratio": 0.1,
    "train.max_steps": 200,
    "dpo.loss_type": "sigmoid",
    "dpo.beta": 0.1,
    "dpo.label_smoothing": 0.0,
    "dpo.disable_dropout": True,
}
LOW_VRAM = {
    "train.per_device_train_batch_size": 1,
    "train.gradient_accumulation_steps": 8,
    "train.optim": "paged_adamw_8bit",
    "data.max_length": 256,
    "train.gradient_checkpointing": True,
    "train.offload_activations": True,
}
FAST = {
    "train.per_device_train_batch_size": 4,
    "train.gradient_accumulation_steps": 2,
    "train.memory_budget": "12GiB",
    "model.attn_implementation": "auto",
    "data.packing": True,
}
RECIPE = {
    "tinyllama_sft": RECIPE_SFT,
    "tinyllama_dpo": RECIPE_DPO,
    "tinyllama_sft_low_vram": {**RECIPE_SFT, **LOW_VRAM},
    "tinyllama_dpo_low_vram": {
        **RECIPE_DPO,
        **LOW_VRAM,
        "data.max_prompt_length": 256,
        "model.adapter": "out/tinyllama_sft_low_vram",
    },
    "tinyllama_sft_fast": {**RECIPE_SFT, **FAST},
    "tinyllama_dpo_fast": {**RECIPE_DPO, **FAST, "model.adapter": "out/tinyllama_sft_fast"},
}


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_files_of_the_project_load(path):
    config = load_config(path)
    assert config.method == next((name for name in ("dpo", "grpo") if name in path.stem), "sft")
    assert config.train.output_dir == f"out/{path.stem}"


@pytest.mark.parametrize("name", RECIPE)
def test_the_recipe_as_it_is_written(name):
    config = load_config(RUNS / f"{name}.toml")
    assert {key: value_of(config, key) for key in RECIPE[name]} == RECIPE[name]


def test_the_smollm2_files_have_the_recipes_lora_and_optimizer():
    for method, other in (("sft", RECIPE_SFT), ("dpo", RECIPE_DPO)):
        config = load_config(RUNS / f"smollm2_{method}.toml")
        keys = [
            key
            for key in other
            if key.startswith(("lora.", "model.bnb", "train."))
            and key not in ("train.precision", "train.max_steps", "train.num_train_epochs")
        ]
        assert {key: value_of(config, key) for key in keys} == {key: other[key] for key in keys}
        assert config.train.precision in ("auto", "fp16")  # auto is fp16 on a GPU
    assert value_of(config, "data.filters") == FILTERS


def test_all_projections_are_seven():
    assert list(ALL_PROJECTIONS) == RECIPE_MODEL["lora.target_modules"]
