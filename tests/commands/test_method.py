"""`data`, `plan`, `time` and `verify` take the flags of `sft` and of `dpo`: the method is inferred, and said."""

import pytest
from workspace import CHATS, PAIRS

from lowlevel.config.method import infer_method
from lowlevel.errors import ConfigError

LABELLED = ("prompt", "completion", "label")
KEYS, ROWS, DEFAULT = "is given", "its rows have", "the default"


@pytest.mark.parametrize(
    ("tables", "columns", "method", "why"),
    [
        ({"dpo": {"beta": 0.2}}, (), "dpo", f"dpo.beta {KEYS}"),
        ({"model": {"adapter": "out/a"}}, CHATS[0], "dpo", f"model.adapter {KEYS}"),
        ({"data": {"format": "orca"}}, (), "dpo", f'data.format = "orca" {KEYS}'),
        ({"data": {"format": "messages"}}, PAIRS[0], "sft", f'data.format = "messages" {KEYS}'),
        ({"sft": {"loss_type": "mine"}}, PAIRS[0], "sft", f"sft.loss_type {KEYS}"),
        ({"data": {"weight_column": "w"}}, PAIRS[0], "sft", f"data.weight_column {KEYS}"),
        ({"lora": {"init_from": "out/a"}}, PAIRS[0], "dpo", f"{ROWS} the columns chosen and rejected"),
        ({"lora": {"init_from": "out/a"}}, CHATS[0], "sft", f"{ROWS} no columns chosen and rejected"),
        ({"data": "not a table"}, (), "sft", DEFAULT),
        ({"kto": {"beta": 0.2}, "model": {"adapter": "a"}}, PAIRS[0], "kto", f"kto.beta {KEYS}"),
        ({"kto": {"beta": 0.2}, "data": {"format": "messages"}}, (), "kto", f"kto.beta {KEYS}"),
        ({"reward": {"disable_dropout": 1}, "model": {"adapter": "a"}}, (), "reward", "reward.disable_dropout"),
        ({"reward": {"disable_dropout": 1}, "data": {"max_prompt_length": 9}}, (), "reward", KEYS),
        ({"model": {"adapter": "a"}}, LABELLED, "kto", f"model.adapter {KEYS}"),
        ({}, LABELLED, "kto", f"{ROWS} the columns completion and label"),
    ],
)
def test_the_method_comes_from_the_keys_before_the_rows(tables, columns, method, why):
    found, reason = infer_method(tables, lambda: columns)
    assert found == method and why in reason


@pytest.mark.parametrize(
    ("tables", "columns", "words"),
    [
        ({"model": {"adapter": "a"}, "data": {"format": "messages"}}, (), ("model.adapter is for dpo", "messages")),
        ({"dpo": {"beta": 1}, "kto": {"beta": 1}}, (), ("dpo.beta is for dpo", "kto.beta is for kto")),
        ({"data": {"weight_column": "w"}, "kto": {"beta": 1}}, (), ("data.weight_column is for sft", "is for kto")),
        ({"data": {"weight_column": "w"}, "reward": {"disable_dropout": True}}, (), ("is for sft", "is for reward")),
        ({"sft": {"loss_type": "a"}, "dpo": {"beta": 1}}, (), ("sft.loss_type is for sft", "dpo.beta is for dpo")),
        ({}, ("prompt", "messages", "chosen", "rejected"), ("of sft and of dpo", "--method")),
    ],
)
def test_signs_of_both_methods_are_refused(tables, columns, words):
    with pytest.raises(ConfigError) as error:
        infer_method(tables, lambda: columns)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["data", "plan", "time", "verify"])
def test_the_flags_of_a_dpo_run_are_those_of_every_command_that_looks_at_a_run(runs, space, cli, tmp_path, command):
    holdout = ("--data.eval_source", "holdout", "--data.eval_limit", 2, "--data.max_length", 128)
    flags = ("--model.name", space.base, "--data.source", space.dpo_rows, "--train.output_dir", tmp_path / "new")
    more = ("--steps", 1) if command == "time" else ()
    said = cli(command, *flags, "--model.adapter", runs.sft, *holdout, "--on-bad-row", "skip", *more)
    assert said.code == 0, said.err
    assert "method: dpo (model.adapter is given)\n" in said.out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("rows", "method"), [("sft_rows", "sft"), ("dpo_rows", "dpo")])
def test_without_other_signs_the_rows_say_it(space, cli, rows, method):
    flags = ("--model.name", space.base, "--data.source", getattr(space, rows), "--data.max_length", 128)
    said = cli("data", *flags)
    assert said.code == 0 and f"method: {method} (its rows have" in said.out, said.err
    other = "dpo" if method == "sft" else "sft"
    forced = cli("data", *flags, "--method", other)
    assert forced.code == 3 and "method:" not in forced.out and other.upper() in forced.err


def test_a_run_folder_and_a_run_file_name_their_method(runs, cli, tmp_path):
    for path in (runs.dpo, runs.space.folder / "dpo.toml"):
        said = cli("data", path)
        assert said.code == 0 and "method:" not in said.out and "chosen" in said.out, said.err
        refused = cli("data", path, "--method", "sft")
        assert refused.code == 2 and 'method = "dpo"' in refused.err and refused.err.count("\n") == 1
    assert cli("plan", tmp_path).err == f"error: {tmp_path} is not a run folder: it has no config.toml\n"
    assert "has its own config.toml" in cli("verify", runs.dpo, "--method", "dpo").err
