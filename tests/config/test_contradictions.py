"""Settings that exclude each other are refused, a line each; those at the edge are fine."""

import ast

import pytest
from config_keys import HOLDOUT, PACKAGE, PREFERENCES, merged, refused

from lowlevel.config.contradictions import parse_size
from lowlevel.config.file import config_from_tables

CONTRADICTIONS = [
    ({"dpo": {"beta": 0.1}}, '[dpo] is not used when method = "sft"'),
    ({"dpo": {}}, '[dpo] is not used when method = "sft"'),
    ({"method": "dpo", "sft": {}}, '[sft] is not used when method = "dpo"'),
    ({"model": {"adapter": "a"}}, "model.adapter is for dpo; to go on training use lora.init_from"),
    ({"data": {"format": "orca"}}, 'data.format = "orca" holds preferences; sft needs "messages"'),
    ({"data": {"format": "preference"}}, 'data.format = "preference" is for dpo; sft needs "messages"'),
    ({"data": {"max_prompt_length": 10}}, "data.max_prompt_length is for dpo"),
    ({"method": "dpo", "data": {"format": "messages"}}, 'dpo needs data.format = "preference" or "orca"'),
    (
        merged(PREFERENCES, {"model": {"adapter": "a", "adapter_mode": "none"}}),
        'model.adapter is set, but adapter_mode = "none" would ignore it',
    ),
    (
        merged(PREFERENCES, {"model": {"adapter_mode": "stack"}}),
        'model.adapter_mode = "stack" needs model.adapter',
    ),
    (
        merged(PREFERENCES, {"data": {"max_prompt_length": 65, "max_length": 64}}),
        "data.max_prompt_length 65 > data.max_length 64",
    ),
    ({"data": {"eval_limit": 5}}, "data.eval_limit needs data.eval_source"),
    ({"data": {"eval_source": "holdout"}}, 'data.eval_source = "holdout" needs data.eval_limit'),
    ({"train": {"eval_steps": 5}}, "train.eval_steps needs data.eval_source"),
    (
        merged(HOLDOUT, {"train": {"early_stopping_patience": 2}}),
        "train.early_stopping_patience needs train.eval_steps",
    ),
    (
        {"train": {"gradient_checkpointing": False, "recomputed_layers": 2}},
        "train.recomputed_layers needs gradient_checkpointing = true",
    ),
    (
        {"train": {"gradient_checkpointing": False, "offload_activations": True}},
        "train.offload_activations needs gradient_checkpointing = true",
    ),
    (
        {"train": {"recomputed_layers": 0, "offload_activations": True}},
        "train.offload_activations needs recomputed layers, and recomputed_layers = 0 leaves none",
    ),
    (
        {"data": {"packing": False}, "train": {"micro_batch_positions": 2048}},
        "train.micro_batch_positions needs data.packing = true",
    ),
    (
        {"train": {"micro_batch_positions": 255}},
        "train.micro_batch_positions 255 is less than one sequence (256)",
    ),
    (
        merged(PREFERENCES, {"train": {"micro_batch_positions": 511}}),
        "train.micro_batch_positions 511 is less than one sequence (512)",
    ),
    *(
        ({"train": {"memory_budget": "15GiB", key: value}}, f"train.{key} is chosen by memory_budget")
        for key, value in (("recomputed_layers", 2), ("micro_batch_positions", 2048), ("dequantize_once", True))
    ),
    (
        {"train": {"memory_budget": "15GiB", "gradient_checkpointing": False}},
        "train.memory_budget chooses how many layers are recomputed: leave out gradient_checkpointing = false",
    ),
    (
        {"train": {"memory_budget": "15 apples"}},
        'train.memory_budget: expected a size like "15GiB" or "800MiB", got \'15 apples\'',
    ),
    (
        {"data": {"packing": False}, "train": {"memory_budget": "15GiB"}},
        "train.memory_budget needs data.packing = true",
    ),
    (
        {"train": {"per_device_train_batch_size": 2048, "gradient_accumulation_steps": 1024}},
        "train.per_device_train_batch_size * gradient_accumulation_steps = 2,097,152 examples a step; "
        "at most 1,048,576",
    ),
    ({"train": {"warmup_steps": 11, "max_steps": 10}}, "train.warmup_steps 11 > max_steps 10"),
    ({"lora": {"init_from": "a", "r": 8}}, "lora.r comes from lora.init_from"),
    ({"lora": {"init_from": "a", "lora_alpha": 8}}, "lora.lora_alpha comes from lora.init_from"),
    ({"lora": {"init_from": "a", "target_modules": ["q_proj"]}}, "lora.target_modules comes from lora.init_from"),
    (
        {"model": {"load_in_4bit": False, "bnb_4bit_quant_type": "nf4"}},
        "model.bnb_4bit_* keys need load_in_4bit = true",
    ),
    (
        {"model": {"load_in_4bit": False, "bnb_4bit_use_double_quant": True}},
        "model.bnb_4bit_* keys need load_in_4bit = true",
    ),
    *(
        ({"trace": {key: value}}, f"trace.{key} needs trace.every or trace.steps")
        for key, value in (("level", "pair"), ("gradients", True))
    ),
    (
        merged(PREFERENCES, {"dpo": {"reference_cache": "a"}, "trace": {"every": 1, "level": "token"}}),
        'trace.level = "token" needs the reference\'s tokens, of which dpo.reference_cache holds sums alone',
    ),
]


@pytest.mark.parametrize(("tables", "message"), CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_settings_that_exclude_each_other(tables, message):
    assert f"run.toml: {message}" in refused(tables)


def test_every_contradiction_is_in_the_list_above():
    functions = [
        node
        for node in ast.parse((PACKAGE / "config" / "contradictions.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "list[Check]"
    ]
    assert [f.name for f in functions] == ["_method_and_model", "_data", "_train", "_trace"]
    lists = [node.value for f in functions for node in ast.walk(f) if isinstance(node, ast.Return)]
    checks = [check for one in lists for check in one.elts if isinstance(check, ast.Tuple)]
    assert len(checks) > 20
    for check in checks:
        pieces = [n.value for n in ast.walk(check.elts[1]) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert any(all(piece in message for piece in pieces) for _, message in CONTRADICTIONS), pieces


@pytest.mark.parametrize(
    "tables",
    [
        merged(PREFERENCES, {"data": {"max_prompt_length": 64, "max_length": 64}}),
        {"train": {"warmup_steps": 10, "max_steps": 10}},
        merged(PREFERENCES, {"model": {"adapter_mode": "none"}}),
        {"model": {"load_in_4bit": False}},
    ],
)
def test_settings_at_the_edge_are_fine(tables):
    config_from_tables(tables, "run.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [("15GiB", 15 * 2**30), ("1.5 GB", 1_500_000_000), ("800MiB", 800 * 2**20), ("7MB", 7_000_000), ("15", None),
     ("-1GiB", None), ("GiB", None), ("1e3GiB", None), ("0GiB", 0)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size
