"""Every mistake in a run file or a flag is one line that names the key and the value."""

import math
import re

import pytest
from config_keys import PREFERENCES, merged, refused, write

from lowlevel.config.file import OTHER_NAMES, config_from_tables, load_config
from lowlevel.config.schema import SECTIONS
from lowlevel.errors import ConfigError

LOSS_TYPED = "sft, dpo, grpo, rloo, ppo, online_dpo"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("metod", 'did you mean "method"?'),
        ("trian.seed", 'did you mean "train"?'),
        ("train.learning_rat", 'did you mean "train.learning_rate"?'),
        ("lora.alpha", 'did you mean "lora.lora_alpha"?'),
        ("train.lr", 'did you mean "train.learning_rate"?'),
        ("train.fp16", 'did you mean "train.precision"?'),
        ("train.max_seq_length", 'did you mean "data.max_length"?'),
        ("train.packing", 'did you mean "data.packing"?'),
        ("model.max_length", 'did you mean "data.max_length"?'),
        ("learning_rate", 'did you mean "train.learning_rate"?'),
        ("epochs", 'did you mean "train.num_train_epochs"?'),
        ("lora.lora_rank", 'did you mean "lora.r"?'),
        ("kto.loss_type", f"loss_type is a key of {LOSS_TYPED}"),
        ("sft.reward", "reward is a key of grpo, rloo, ppo, online_dpo"),
        ("sft.max_steps", 'did you mean "train.max_steps"?'),
        ("dpo.betas", 'did you mean "dpo.beta"?'),
        ("peft_config", 'did you mean "lora"?'),
        ("lora.zzzzzz", f"known: {', '.join(SECTIONS['lora'].model_fields)}"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, hint):
    section, _, name = key.partition(".")
    unknown = section if section == "trian" else key
    assert refused({section: {name: 1} if name else 1}) == [f'run.toml: unknown key "{unknown}"; {hint}']
    if name:
        with pytest.raises(ConfigError, match=re.escape(f'unknown key "{unknown}"')):
            load_config(None, {key: "1"})


LONG = "k" * 5000


@pytest.mark.parametrize(
    ("tables", "overrides"),
    [
        ({LONG: 1}, {}),
        ({"train": {LONG: 1}}, {}),
        ({"data": {"filters": [{"column": "a", "op": "==", "value": 1, LONG: 2}]}}, {}),
        ({"method": LONG}, {}),
        ({}, {f"train.{LONG}": "1"}),
        ({LONG: 1}, {f"{LONG}.x": "1"}),
        ({}, {"train.seed": LONG}),
    ],
)
def test_no_name_or_value_makes_a_line_of_thousands(tmp_path, tables, overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, tables), overrides, method="sft")
    assert max(map(len, str(caught.value).splitlines())) < 1000 and "kkk" in str(caught.value)


def test_names_of_other_programs_are_of_keys_that_exist():
    for other, name in OTHER_NAMES.items():
        sections = [model.model_fields for model in SECTIONS.values() if name in model.model_fields]
        assert sections or name in SECTIONS, other
        assert not any(other in fields for fields in sections), other


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.learning_rate", "abc", "expected a number, got 'abc'"),
        ("train.learning_rate", 2, "expected less than or equal to 1, got 2"),  # a typing error of 2e-4
        ("train.learning_rate", True, "expected a number, got True"),
        ("train.learning_rate", 0.0, "expected greater than 0, got 0.0"),
        ("train.learning_rate", -1e-4, "expected greater than 0, got -0.0001"),
        ("train.learning_rate", math.nan, "got nan"),
        ("train.learning_rate", math.inf, "expected a finite number, got inf"),
        ("train.max_grad_norm", math.inf, "expected a finite number, got inf"),
        ("train.weight_decay", -0.1, "expected greater than or equal to 0, got -0.1"),
        ("train.seed", -1, "expected greater than or equal to 0, got -1"),
        ("train.seed", 1.0, "expected an integer, got 1.0"),
        ("train.max_steps", 0, "expected greater than 0, got 0"),
        ("train.warmup_ratio", 1.5, "expected less than or equal to 1, got 1.5"),
        ("train.optim", "adam", "got 'adam'"),
        ("train.gradient_checkpointing", 1, "expected a boolean, got 1"),
        ("lora.r", 0, "expected greater than 0, got 0"),
        ("lora.r", "8", "expected an integer, got '8'"),
        ("lora.r", 4097, "expected less than or equal to 4096, got 4097"),  # as where an adapter is opened
        ("lora.lora_alpha", 0, "expected greater than 0, got 0"),
        ("lora.lora_alpha", 1048577, "expected less than or equal to 1048576, got 1048577"),
        ("lora.lora_dropout", 1.0, "expected less than 1, got 1.0"),
        ("lora.lora_dropout", -0.1, "expected greater than or equal to 0, got -0.1"),
        ("lora.target_modules", [], "got []"),
        ("data.max_length", 1, "expected greater than 1, got 1"),
        ("data.limit", 0, "expected greater than 0, got 0"),
        ("data.source", 3, "expected a string, got 3"),
        ("data.template_date", "yesterday", "expected a date like 2024-07-26, got 'yesterday'"),
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


def test_a_value_that_is_another_keys_names_that_key():
    (line,) = refused({"method": "grpo", "grpo": {"loss_type": "gspo"}})
    assert line == 'run.toml: grpo.loss_type: gspo is set by grpo.importance_sampling_level = "sequence"'


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "abc", "", "true", "[1]"])
def test_a_flag_that_is_no_number(text):
    with pytest.raises(ConfigError, match=r"flags: train\.learning_rate: expected "):
        load_config(None, {"train.learning_rate": text})


@pytest.mark.parametrize("value", ["1,abc", 10**400, [1, 10**400], {"a": 1}])
def test_a_list_of_numbers_that_holds_none(value):
    (line,) = refused({"grpo": {"reward_weights": value}})
    assert line.startswith("run.toml: grpo.reward_weights") and ": expected a" in line


def test_all_problems_are_reported_at_once_a_line_each():
    lines = refused({"train": {"lr": 1, "seed": -1}, "dpo": {"beta": "x"}, "extra": 1})
    assert sorted(line.split(": ", 1)[1].split("; ")[0] for line in lines) == [
        "dpo.beta: expected a number, got 'x'",
        "train.seed: expected greater than or equal to 0, got -1",
        'unknown key "extra"',
        'unknown key "train.lr"',
    ]


TEXTS = """model.name model.revision model.adapter lora.init_from data.source data.split data.eval_split
data.chat_template_from data.eval_source train.output_dir dpo.reference_cache""".split()


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_path_or_name_is_not_the_current_folder(key, text):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {key: text}, method="dpo")
    assert str(caught.value) == f"flags: {key}: is empty; leave the key out for its default"


def test_an_empty_layer_name_is_refused_and_an_empty_value_of_a_filter_is_not():
    assert refused({"lora": {"target_modules": ["q_proj", ""]}}) == [
        "run.toml: lora.target_modules: is empty; leave the key out for its default"
    ]
    config = config_from_tables({"data": {"filters": [{"column": "a", "op": "!=", "value": ""}]}}, "run.toml")
    assert config.data.filters[0].value == ""


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"colum": "a"}, 'unknown key "data.filters.0.colum"; did you mean "column"?'),
        ({"op": None}, "data.filters.0.op: is missing"),
        ({"value": {"b": 1}}, "data.filters.0.value: expected "),
    ],
)
def test_a_wrong_filter_is_one_line(wrong, line):
    row = {"column": "a", "op": "==", "value": 1, **wrong}
    (said,) = refused({"data": {"filters": [{key: value for key, value in row.items() if value is not None}]}})
    assert said.startswith(f"run.toml: {line}")


@pytest.mark.parametrize(("table", "flag"), [({"train": 3}, "train.seed"), ({}, "method.x")])
def test_a_section_that_is_no_table(tmp_path, table, flag):
    path = write(tmp_path, table)
    for overrides in ({}, {flag: "1"})[not table :]:
        with pytest.raises(ConfigError, match=flag.split(".")[0]):
            load_config(path, overrides, method="sft")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *(
            (content, "not a readable TOML file")
            for content in (b"[train\nseed = 1", b"\xff\xfe", b"seed = 1\nseed = 2")
        ),
        (None, "no such run file"),
    ],
)
def test_a_file_that_cannot_be_read_names_itself(tmp_path, content, said):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"run\.toml: {said}") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        load_config(tmp_path)
    for data in (b'{"a": 1}', b"PAR1\xff"):
        (tmp_path / "rows.jsonl").write_bytes(data)
        with pytest.raises(ConfigError, match=r"if it holds rows: --data.source .*rows\.jsonl$"):
            load_config(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[train]\nseed = True\n", "(at line 2, column 8): seed = True"),
        ("[data]\nsource = rows.jsonl", "(at line 2, column 10): source = rows.jsonl"),
        ("train:\n  seed: 1\n", "(at line 1, column 6): train:"),
    ],
)
def test_a_line_that_is_no_toml_is_shown(tmp_path, content, said):
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(tmp_path / "run.toml")


def test_a_run_file_as_notepad_writes_it(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nseed = 7\r\n")
    assert load_config(tmp_path / "run.toml").train.seed == 7
    (tmp_path / "run.toml").write_bytes("[train]\nseed = 7\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"not a readable TOML file: .*; save it as UTF-8$"):
        load_config(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("lora.target_modules", "q_proj v_proj", ("q_proj", "v_proj")),
        ("lora.target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("lora.target_modules", r".*\.(q|v)_proj{1,2}", (r".*\.(q|v)_proj{1,2}",)),
        ("train.report_to", "none", ()),
        ("train.report_to", "wandb, tensorboard", ("wandb", "tensorboard")),
        ("train.deterministic", "True", True),
        ("data.packing", "False", False),
        ("data.columns", "a b,c", ("a b", "c")),
    ],
)
def test_values_as_other_programs_write_them(flag, text, value):
    section, _, key = flag.partition(".")
    assert getattr(getattr(load_config(None, {flag: text}), section), key) == value


def test_tables_of_a_flag_may_be_json():
    (source,) = load_config(None, {"data.sources": '[{"source": "a.jsonl", "weight": 1}]'}).data.sources
    assert (source.source, source.weight) == ("a.jsonl", 1)


LOCATIONS = "model.name model.adapter lora.init_from data.source data.eval_source train.output_dir".split()


@pytest.mark.parametrize("key", LOCATIONS)
def test_paths_are_expanded_as_a_shell_does(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, _, name = key.partition(".")
    for text in ("~/a b", "$HOME/a b", "${HOME}/a b"):
        tables = merged(PREFERENCES, {section: {name: text}})
        assert getattr(getattr(config_from_tables(tables, "x"), section), name) == str(tmp_path / "a b")
    (line,) = refused(merged(PREFERENCES, {section: {name: "$NO_SUCH/x"}}))
    assert line == f"run.toml: {key}: expected a path whose variables are set in the environment, got '$NO_SUCH/x'"


def test_a_path_that_exists_as_written_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$a").mkdir()
    assert load_config(None, {"train.output_dir": "$a"}).train.output_dir == "$a"


def test_the_command_and_the_file_must_agree(tmp_path):
    path = write(tmp_path, PREFERENCES)
    with pytest.raises(ConfigError, match='method = "dpo", but the command is "sft"'):
        load_config(path, method="sft")
    assert load_config(path, method="dpo").method == "dpo"
    assert load_config(path).method == "dpo"
    assert load_config(write(tmp_path, {"data": {"format": "orca"}}), method="dpo").method == "dpo"
