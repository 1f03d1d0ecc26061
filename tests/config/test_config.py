"""The run file: every key arrives from a file and from a flag, and the resolved file reads back as the same run."""

import ast
import re
import tomllib

import pytest
import tomli_w
from config_keys import HOLDOUT, KEYS, PACKAGE, PREFERENCES, merged, value_of, write

from lowlevel.config.data import Filter
from lowlevel.config.file import config_from_tables, load_config, to_tables
from lowlevel.config.schema import SECTIONS, RunConfig
from lowlevel.errors import ConfigError


def test_the_list_of_examples_has_every_key():
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
    if key == "data.sources":
        text = '[{source = "a.jsonl", weight = 0.7}, {source = "b.jsonl", weight = 0.3}]'
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {number}" for key, number in value.items()) + "}"
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


def test_dpo_has_defaults_of_its_own_where_nothing_is_given():
    sft, dpo = config_from_tables({}, "test"), config_from_tables({"method": "dpo"}, "test")
    assert (sft.train.learning_rate, sft.data.format) == (2e-4, "auto")
    assert (dpo.train.learning_rate, dpo.data.format) == (1e-5, "auto")
    given = {"method": "dpo", "train": {"learning_rate": 3e-4}, "data": {"format": "orca"}}
    assert config_from_tables(given, "test").train.learning_rate == 3e-4
    assert config_from_tables(given, "test").data.format == "orca"


@pytest.mark.parametrize(
    ("given", "loss_type", "beta"),
    [
        (["sigmoid", "bco_pair"], "sigmoid + bco_pair", 0.1),
        ('["sigmoid", "m:mine"]', "sigmoid + m:mine", 0.1),  # a flag
        (["simpo"], "simpo", 2.0),
    ],
)
def test_a_list_of_losses_as_in_trl_is_their_sum(given, loss_type, beta):
    for tables in ({"method": "dpo", "dpo": {"loss_type": given}}, {"method": "dpo", "dpo": {"loss_type": loss_type}}):
        config = config_from_tables(tables, "run.toml")
        assert (config.dpo.loss_type, config.dpo.beta) == (loss_type, beta)
    with pytest.raises(ConfigError, match='dpo.loss_weights: write the weights into loss_type: "0.8'):
        config_from_tables({"method": "dpo", "dpo": {"loss_type": given, "loss_weights": [0.8, 0.2]}}, "run.toml")


def names_in(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_every_key_is_read_outside_the_configuration():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "config"]
    read = set().union(*(names_in(path.read_text(encoding="utf-8")) for path in files))
    assert {key.split(".")[1] for key in KEYS} | set(Filter.model_fields) | {"method"} <= read
