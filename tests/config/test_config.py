"""The run file: every key arrives, every mistake is one line that names the key, the recipe's files hold the recipe."""

import ast
import math
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

import lowlevel.config
from lowlevel.config import (
    ALL_PROJECTIONS,
    SECTIONS,
    Filter,
    RunConfig,
    config_from_tables,
    load_config,
    to_tables,
)
from lowlevel.contradictions import parse_size
from lowlevel.errors import ConfigError

PACKAGE = Path(lowlevel.config.__file__).parent
RUNS = Path(__file__).parents[2] / "runs"

# A value other than the default for each key, and the other settings without which it would contradict something.
PREFERENCES = {"method": "dpo", "data": {"format": "orca"}}
HOLDOUT = {"data": {"eval_source": "holdout", "eval_limit": 5}}
KEYS = {
    "model.name": ("some/base", {}),
    "model.revision": ("5e1f", {}),
    "model.load_in_4bit": (False, {}),
    "model.bnb_4bit_quant_type": ("fp4", {}),
    "model.bnb_4bit_use_double_quant": (False, {}),
    "model.attn_implementation": ("eager", {}),
    "model.embeddings_on_host": (True, {}),
    "model.adapter": ("out/sft", PREFERENCES),
    "model.adapter_mode": ("original", {**PREFERENCES, "model": {"adapter": "out/sft"}}),
    "lora.r": (8, {}),
    "lora.lora_alpha": (12.5, {}),
    "lora.lora_dropout": (0.25, {}),
    "lora.target_modules": (["q_proj", "v_proj"], {}),
    "lora.init_from": ("out/older", {}),
    "data.source": ("rows.jsonl", {}),
    "data.split": ("test_sft", {}),
    "data.shuffle_seed": (42, {}),
    "data.limit": (3000, {}),
    "data.format": ("orca", {"method": "dpo"}),
    "data.filters": ([{"column": "score", "op": ">=", "value": 8}], {}),
    "data.chat_template_from": ("some/chat.jinja", {}),
    "data.supervise": ("all", {}),
    "data.max_length": (64, {}),
    "data.max_prompt_length": (32, PREFERENCES),
    "data.packing": (False, {}),
    "data.on_bad_row": ("skip", {}),
    "data.eval_source": ("heldout.jsonl", {}),
    "data.eval_split": ("validation", {}),
    "data.eval_limit": (7, {"data": {"eval_source": "heldout.jsonl"}}),
    "train.output_dir": ("out/3", {}),  # text, though it could be read as something else
    "train.per_device_train_batch_size": (1, {}),
    "train.gradient_accumulation_steps": (8, {}),
    "train.learning_rate": (1e-5, {}),
    "train.lr_scheduler_type": ("linear", {}),
    "train.warmup_ratio": (0.1, {}),
    "train.warmup_steps": (3, {}),
    "train.max_steps": (200, {}),
    "train.num_train_epochs": (2.5, {}),
    "train.optim": ("paged_adamw_8bit", {}),
    "train.weight_decay": (0.01, {}),
    "train.max_grad_norm": (0.5, {}),
    "train.precision": ("bf16", {}),
    "train.gradient_checkpointing": (False, {}),
    "train.execution": ("eager", {}),
    "train.recomputed_layers": (4, {}),
    "train.offload_activations": (True, {}),
    "train.micro_batch_positions": (2048, {}),
    "train.dequantize_once": (True, {}),
    "train.memory_budget": ("15GiB", {}),
    "train.deterministic": (True, {}),
    "train.seed": (7, {}),
    "train.data_order": ("sequential", {}),
    "train.logging_steps": (1, {}),
    "train.eval_steps": (4, HOLDOUT),
    "train.early_stopping_patience": (3, {**HOLDOUT, "train": {"eval_steps": 2}}),
    "train.save_steps": (50, {}),
    "train.save_total_limit": (5, {}),
    "dpo.loss_type": ("ipo", PREFERENCES),
    "dpo.beta": (0.5, PREFERENCES),
    "dpo.label_smoothing": (0.1, PREFERENCES),
    "dpo.discopop_tau": (0.05, PREFERENCES),
    "dpo.dpop_lambda": (50.0, PREFERENCES),
    "dpo.rpo_alpha": (1.0, PREFERENCES),
    "dpo.disable_dropout": (False, PREFERENCES),
    "dpo.reference_cache": ("out/reference", PREFERENCES),
    "trace.every": (5, {}),
    "trace.steps": ([1, 8], {}),
    "trace.level": ("token", {"trace": {"every": 1}}),
    "trace.gradients": (True, {"trace": {"every": 1}}),
}


def merged(*parts: dict) -> dict:
    """Tables of tables, later ones over earlier ones."""
    tables: dict = {}
    for part in parts:
        for section, value in part.items():
            tables[section] = {**tables.get(section, {}), **value} if isinstance(value, dict) else value
    return tables


def write(folder: Path, tables: dict) -> Path:
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def value_of(config: RunConfig, key: str) -> object:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if isinstance(value, tuple):
        value = [item.model_dump() if isinstance(item, Filter) else item for item in value]
    return value


def refused(tables: dict) -> list[str]:
    """The lines that these tables give."""
    with pytest.raises(ConfigError) as caught:
        config_from_tables(tables, "run.toml")
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_the_list_above_has_every_key():
    assert list(KEYS) == [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]
    assert set(RunConfig.model_fields) == {"method", *SECTIONS}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_arrives_from_a_file_and_from_a_flag(tmp_path, key):
    value, needs = KEYS[key]
    section, name = key.split(".")
    assert value_of(config_from_tables(needs, "needs") if key != "data.format" else RunConfig(), key) != value
    from_file = load_config(write(tmp_path, merged(needs, {section: {name: value}})))
    assert value_of(from_file, key) == value
    text = value if isinstance(value, str) else re.sub(r"^x = ", "", tomli_w.dumps({"x": value})).strip()
    if key == "data.filters":
        text = '[{column = "score", op = ">=", value = 8}]'
    assert load_config(write(tmp_path, needs), {key: text}) == from_file


def test_a_flag_wins_over_the_file(tmp_path):
    path = write(tmp_path, {"train": {"learning_rate": 1e-3, "seed": 5}})
    train = load_config(path, {"train.learning_rate": "3e-4"}).train
    assert (train.learning_rate, train.seed) == (3e-4, 5)


def test_target_modules_also_as_names_with_commas():
    assert load_config(None, {"lora.target_modules": "q_proj,v_proj"}).lora.target_modules == ("q_proj", "v_proj")


def test_text_stays_text_though_it_looks_like_a_number():
    config = load_config(None, {"train.output_dir": "7", "data.source": "true", "model.revision": "1e5"})
    assert (config.train.output_dir, config.data.source, config.model.revision) == ("7", "true", "1e5")


# Mistakes


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"metod": "sft"}, 'run.toml: unknown key "metod"; did you mean "method"?'),
        ({"trian": {"seed": 1}}, 'run.toml: unknown key "trian"; did you mean "train"?'),
        (
            {"train": {"learning_rat": 1e-4}},
            'run.toml: unknown key "train.learning_rat"; did you mean "learning_rate"?',
        ),
        ({"lora": {"alpha": 32}}, 'run.toml: unknown key "lora.alpha"; did you mean "lora_alpha"?'),
        (
            {"data": {"filters": [{"colum": "a", "column": "a", "op": "==", "value": 1}]}},
            'run.toml: unknown key "data.filters.0.colum"; did you mean "column"?',
        ),
        (
            {"lora": {"zzzzzz": 1}},
            f'run.toml: unknown key "lora.zzzzzz"; known: {", ".join(SECTIONS["lora"].model_fields)}',
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(tables, line):
    assert refused(tables) == [line]


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(ConfigError, match=r'unknown key "train\.learning_rat"; did you mean "learning_rate"\?'):
        load_config(None, {"train.learning_rat": "1e-4"})
    with pytest.raises(ConfigError, match=r'unknown key "trian"; did you mean "train"\?'):
        load_config(None, {"trian.seed": "1"})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.learning_rate", "abc", "expected a number, got 'abc'"),
        ("train.learning_rate", True, "expected a number, got True"),
        ("train.learning_rate", 0.0, "expected greater than 0, got 0.0"),
        ("train.learning_rate", -1e-4, "expected greater than 0, got -0.0001"),
        ("train.learning_rate", math.nan, "got nan"),
        ("train.learning_rate", math.inf, "expected a finite number, got inf"),
        ("train.max_grad_norm", math.inf, "expected a finite number, got inf"),
        ("train.weight_decay", -0.1, "expected greater than or equal to 0, got -0.1"),
        ("train.seed", -1, "expected greater than or equal to 0, got -1"),
        ("train.seed", 1.0, "expected a integer, got 1.0"),
        ("train.max_steps", 0, "expected greater than 0, got 0"),
        ("train.warmup_ratio", 1.5, "expected less than or equal to 1, got 1.5"),
        ("train.optim", "adam", "got 'adam'"),
        ("train.gradient_checkpointing", 1, "expected a boolean, got 1"),
        ("lora.r", 0, "expected greater than 0, got 0"),
        ("lora.r", "8", "expected a integer, got '8'"),
        ("lora.lora_alpha", 0, "expected greater than 0, got 0"),
        ("lora.lora_dropout", 1.0, "expected less than 1, got 1.0"),
        ("lora.lora_dropout", -0.1, "expected greater than or equal to 0, got -0.1"),
        ("lora.target_modules", [], "got []"),
        ("data.max_length", 1, "expected greater than 1, got 1"),
        ("data.limit", 0, "expected greater than 0, got 0"),
        ("data.source", 3, "expected a string, got 3"),
        ("data.supervise", "user", "expected 'assistant' or 'all', got 'user'"),
        ("dpo.beta", -1.0, "expected greater than 0, got -1.0"),
        ("dpo.beta", 0, "expected greater than 0, got 0"),
        ("dpo.beta", math.nan, "got nan"),
        ("dpo.label_smoothing", 0.5, "expected less than 0.5, got 0.5"),
    ],
)
def test_wrong_types_and_values_are_one_line_with_the_value(tmp_path, key, value, expected):
    section, name = key.split(".")
    tables = merged(PREFERENCES if section == "dpo" else {}, {section: {name: value}})
    (line,) = refused(tables)
    assert line.startswith(f"run.toml: {key}: expected ")
    assert line.endswith(expected)
    with pytest.raises(ConfigError, match=re.escape(key)):  # TOML writes nan and inf as well
        load_config(write(tmp_path, tables))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "abc", "", "true", "[1]"])
def test_a_flag_that_is_no_number(text):
    with pytest.raises(ConfigError, match=r"flags: train\.learning_rate: expected "):
        load_config(None, {"train.learning_rate": text})


def test_all_problems_are_reported_at_once_a_line_each():
    lines = refused({"train": {"lr": 1, "seed": -1}, "dpo": {"beta": "x"}, "extra": 1})
    assert sorted(line.split(": ", 1)[1].split("; ")[0] for line in lines) == [
        "dpo.beta: expected a number, got 'x'",
        "train.seed: expected greater than or equal to 0, got -1",
        'unknown key "extra"',
        'unknown key "train.lr"',
    ]


def test_a_filter_without_its_operator_is_one_readable_line():
    (line,) = refused({"data": {"filters": [{"column": "a", "value": 1}]}})
    assert line == "run.toml: data.filters.0.op: is missing"


def test_a_filter_value_of_another_kind_is_one_line():
    (line,) = refused({"data": {"filters": [{"column": "a", "op": "==", "value": {"b": 1}}]}})
    assert line.startswith("run.toml: data.filters.0.value: expected ")


@pytest.mark.parametrize(("table", "flag"), [({"train": 3}, "train.seed"), ({}, "method.x")])
def test_a_section_that_is_no_table(tmp_path, table, flag):
    path = write(tmp_path, table)
    for overrides in ({}, {flag: "1"})[not table :]:
        with pytest.raises(ConfigError, match=flag.split(".")[0]):
            load_config(path, overrides, method="sft")


@pytest.mark.parametrize("content", [b"[train\nseed = 1", b"\xff\xfe", b"seed = 1\nseed = 2"])
def test_a_file_that_is_no_toml_names_itself(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml: not a readable TOML file") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such run file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        load_config(tmp_path)


def test_the_command_and_the_file_must_agree(tmp_path):
    path = write(tmp_path, PREFERENCES)
    with pytest.raises(ConfigError, match='method = "dpo", but the command is "sft"'):
        load_config(path, method="sft")
    assert load_config(path, method="dpo").method == "dpo"
    assert load_config(path).method == "dpo"
    assert load_config(write(tmp_path, {"data": {"format": "orca"}}), method="dpo").method == "dpo"


CONTRADICTIONS = [
    ({"dpo": {"beta": 0.1}}, '[dpo] is not used when method = "sft"'),
    ({"dpo": {}}, '[dpo] is not used when method = "sft"'),
    ({"model": {"adapter": "a"}}, "model.adapter is for dpo; to go on training use lora.init_from"),
    ({"data": {"format": "orca"}}, 'data.format = "orca" holds preferences; sft needs "messages"'),
    ({"data": {"format": "preference"}}, 'data.format = "preference" is for dpo; sft needs "messages"'),
    ({"data": {"max_prompt_length": 10}}, "data.max_prompt_length is for dpo"),
    ({"method": "dpo"}, 'dpo needs data.format = "preference" or "orca"'),
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
        {"data": {"packing": False}, "train": {"micro_batch_positions": 2048}},
        "train.micro_batch_positions needs data.packing = true",
    ),
    (
        {"train": {"micro_batch_positions": 511}},
        "train.micro_batch_positions 511 is less than one sequence (512)",
    ),
    (
        merged(PREFERENCES, {"train": {"micro_batch_positions": 1023}}),
        "train.micro_batch_positions 1023 is less than one sequence (1024)",
    ),
    *(
        ({"train": {"memory_budget": "15GiB", key: value}}, f"train.{key} is chosen by memory_budget")
        for key, value in (("recomputed_layers", 2), ("micro_batch_positions", 2048), ("dequantize_once", True))
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
        for node in ast.parse((PACKAGE / "contradictions.py").read_text()).body
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


# The resolved file


ROUND_TRIPS = {
    "sft defaults": {},
    "sft unquantised": {"model": {"load_in_4bit": False}, "train": {"max_steps": 10, "warmup_steps": 3}},
    "sft all": merged(
        HOLDOUT,
        {
            "model": {"revision": "x", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
            "lora": {"target_modules": ["q_proj"], "lora_alpha": 0.1},
            "data": {
                "shuffle_seed": 0,
                "limit": 1,
                "filters": [
                    {"column": "a", "op": "in", "value": ["x", 1, 1.5, True]},
                    {"column": 'quote " and \\', "op": "!=", "value": "\u00e9\n"},
                ],
            },
            "train": {"learning_rate": 1.2345678901234567e-5, "eval_steps": 1, "early_stopping_patience": 1},
        },
    ),
    "sft continued": {"lora": {"init_from": "out/older", "lora_dropout": 0.2}},
    "dpo alone": PREFERENCES,
    "sft traced": {"trace": {"every": 5, "steps": [1], "level": "token", "gradients": True}},
    "dpo none": merged(PREFERENCES, {"model": {"adapter_mode": "none"}}),
    "dpo stack": merged(PREFERENCES, {"model": {"adapter": "out/sft"}, "dpo": {"label_smoothing": 0.1}}),
    "dpo original": merged(
        PREFERENCES,
        {
            "model": {"adapter": "out/sft", "adapter_mode": "original", "load_in_4bit": False},
            "data": {"max_prompt_length": 10},
            "dpo": {"loss_type": "rpo", "rpo_alpha": 0.5, "disable_dropout": False},
        },
    ),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_the_resolved_file_reads_back_as_the_same_configuration(name):
    config = config_from_tables(ROUND_TRIPS[name], "run.toml")
    text = tomli_w.dumps(to_tables(config))
    again = config_from_tables(tomllib.loads(text), "again")
    if name == "dpo none":  # without an adapter the mode says nothing
        config = config.model_copy(update={"model": config.model.model_copy(update={"adapter_mode": "stack"})})
    assert again == config
    assert tomli_w.dumps(to_tables(again)) == text


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.seed = 1


# The files in runs/

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
    "data.format": "messages",
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
    assert config.method == ("dpo" if "dpo" in path.stem else "sft")
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


# "No option without a reader": every field is looked up somewhere, on an expression that holds its section.

CLASSES = {model.__name__: section for section, model in SECTIONS.items()} | {"Filter": "filter", "RunConfig": "run"}


def read_keys(source: str) -> set[tuple[str, str]]:
    """(section, key) of every attribute that a file takes from something annotated as, or assigned from, a section."""
    tree, found = ast.parse(source), set()
    fields = {
        node.target.id: CLASSES[node.annotation.id]
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name) and node.annotation.id in CLASSES
    }

    def kind(node: ast.AST, names: dict[str, str]) -> str | None:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            inner = kind(node.value, names)
            if inner == "run" and node.attr in SECTIONS:
                return node.attr
            if inner is None and node.attr == "config" and isinstance(node.value, ast.Name):
                return fields.get("config") if node.value.id == "self" else "run"  # LoadedRun.config
        return None

    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {
            arg.arg: CLASSES[arg.annotation.id]
            for arg in [*function.args.args, *function.args.kwonlyargs]
            if isinstance(arg.annotation, ast.Name) and arg.annotation.id in CLASSES
        }
        if any(
            isinstance(a.annotation, ast.Subscript) and "Filter" in ast.unparse(a.annotation)
            for a in function.args.args
        ):
            names["f"] = "filter"
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=True))
                for left, right in pairs:
                    if isinstance(left, ast.Name) and (section := kind(right, names)):
                        names[left.id] = section
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and (section := kind(node.value, names)):
                found.add((section, node.attr))
            call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
            if call and (section := kind(node.args[0], names)):  # getattr(config, name) for name in a tuple beside it
                texts = [
                    n.value for n in ast.walk(function) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                found.update((section, text) for text in texts)
    return found


def test_every_key_is_read_outside_the_configuration():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "config.py":
            read |= read_keys(path.read_text(encoding="utf-8"))
    expected = {tuple(key.split(".")) for key in KEYS} | {("filter", key) for key in Filter.model_fields}
    assert expected - read == set()
    assert ("run", "method") in read


@pytest.mark.parametrize(
    ("text", "size"),
    [("15GiB", 15 * 2**30), ("1.5 GB", 1_500_000_000), ("800MiB", 800 * 2**20), ("7MB", 7_000_000), ("15", None),
     ("-1GiB", None), ("GiB", None), ("1e3GiB", None), ("0GiB", 0)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size
