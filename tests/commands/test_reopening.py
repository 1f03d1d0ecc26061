"""A run that is opened again is the one that was trained: its precision, base, adapters and rows, or one error."""

import json
import re
import shutil

import helpers
import pytest
import torch
from refusals import refused
from workspace import CHATS, PAIRS, reply

from lowlevel.errors import CheckpointError, ConfigError, DataError
from lowlevel.model import base
from lowlevel.model.offload import HostEmbedding
from lowlevel.running.reopening import load_run, reopen, step_examples

NOTE = "note: the base is not checked: its hash is for float16, and it is float32 here"


def moved_from(folder, precision: str, device: str = "NVIDIA T4") -> None:
    """What the run would have written on another machine; its run file left the precision to that machine."""
    dtype = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    for name, change in (
        ("environment.json", lambda text: {**text, "device": device, "precision": precision}),
        ("manifest.json", lambda text: {**text, "base": {**text["base"], "dtype": dtype}}),
    ):
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    assert 'precision = "auto"' in (folder / "config.toml").read_text()


@pytest.fixture
def copied(runs, tmp_path):
    return runs.space.copy("dpo", tmp_path)


@pytest.fixture(scope="module")
def rough(runs, cli):
    """A run in bf16, which a CPU has got too."""
    file = runs.space.write("rough", "sft", train={"max_steps": 2, "precision": "bf16"})
    assert cli("sft", file).code == 0
    config = runs.space.folder / "rough" / "config.toml"
    config.write_text(config.read_text().replace('precision = "bf16"', 'precision = "auto"'))
    return config.parent


# Precision


def test_a_run_is_opened_in_the_precision_that_it_computed_in(rough):
    """ "auto" would be fp32 on this machine."""
    opened = reopen(rough, pytest.fail)
    assert (opened.placement.precision, opened.moved) == ("bf16", None)
    run = opened.load(opened.folder.adapter)
    assert run.policy.lm_head_weight.dtype == torch.bfloat16
    found, expected = opened.base_hashes(run.policy)
    assert found == expected == opened.manifest["base"]["sha256"]


def test_its_base_is_checked_though_auto_means_another_precision_here(rough, tmp_path):
    folder = shutil.copytree(rough, tmp_path / "rough")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "base": {**manifest["base"], "sha256": "0" * 64}}))
    with pytest.raises(CheckpointError, match="is not the one that was trained on"):
        load_run(folder)


def test_a_precision_that_this_machine_has_not_got_is_said_in_one_line(copied):
    moved_from(copied, "fp16")
    lines: list[str] = []
    opened = reopen(copied, lines.append)
    assert opened.placement.precision == "fp32" and lines == []
    assert opened.moved == "the run computed in fp16 on NVIDIA T4, this is fp32 on cpu"
    opened.load(opened.folder.adapter)
    assert lines == [f"{NOTE}: {opened.moved}"]


def test_every_command_says_so_and_goes_on(runs, cli, copied, tmp_path):
    moved_from(copied, "fp16")
    for command in (
        ("inspect", copied, "--step", 2),
        ("compare", copied, "--prompts", 1, "--max-new-tokens", 2),
        ("merge", copied, "--out", tmp_path / "merged"),
        ("verify", copied),
        ("replay", copied, "--step", 2),
    ):
        said = cli(*command)
        assert said.code == 0, said.err
        assert said.out.count(NOTE) == 1, command[0]
    checks = json.loads((copied / "verify.json").read_text())["checks"]
    assert "base as in the manifest" not in {check["name"] for check in checks}
    said = cli("generate", copied, "--prompt", "write 1 backwards", "--max-new-tokens", 4)
    assert said.err.startswith(NOTE) and said.err.count("\n") == 1
    assert said.out == cli("generate", runs.dpo, "--prompt", "write 1 backwards", "--max-new-tokens", 4).out


@pytest.fixture
def another_offset(monkeypatch):
    """Nested quantisation takes the mean of the constants, whose last bit another device may round otherwise."""
    plain = base.bnb.nn.Params4bit._quantize

    def shifted(self, device):
        made = plain(self, device)
        state = made.quant_state
        state.offset = torch.nextafter(state.offset, torch.full_like(state.offset, torch.inf))
        return made

    monkeypatch.setattr(base.bnb.nn.Params4bit, "_quantize", shifted)


@pytest.mark.parametrize("change", [{"device": "NVIDIA T4"}, {"threads": 4096}], ids=["device", "threads"])
def test_a_base_that_was_quantised_elsewhere_is_not_refused(copied, another_offset, change):
    """Its hash is another one there; on the run's own machine the same hash is an error."""
    lines = []
    opened = reopen(copied, lines.append)
    with pytest.raises(CheckpointError, match="is not the one that was trained on"):
        opened.policy()
    environment = copied / "environment.json"
    environment.write_text(json.dumps({**json.loads(environment.read_text()), **change}))
    opened = reopen(copied, lines.append)
    opened.policy()
    (line,) = lines
    assert line.startswith("note: the base is not checked: quantised on another machine, it has another hash: the run")
    assert opened.elsewhere and opened.moved is not None


@pytest.mark.parametrize(
    "text", [None, "", "{}", "[]", '{"device": "NVIDIA T4"', '{"device": "NVIDIA T4"}', '{"precision": "fp32"}',
             '{"device": null, "precision": "fp32"}', '{"device": 4, "precision": "fp32"}',
             '{"device": "cpu", "precision": null}', '{"device": "cpu", "precision": "fp32", "threads": "4096"}',
             '{"device": "cpu", "precision": "bf16", "threads": 1}']
)  # fmt: skip
def test_a_folder_that_does_not_say_where_it_ran_has_its_base_checked_all_the_same(copied, another_offset, text):
    environment = copied / "environment.json"
    environment.unlink()
    if text is not None:
        environment.write_text(text)
    opened = reopen(copied, pytest.fail)
    with pytest.raises(CheckpointError, match=r"is not the one that was trained on \(hash \w{12}\); environment.json,"):
        opened.policy()
    assert opened.elsewhere is None and "environment.json does not name" in opened.moved


@pytest.mark.parametrize("missing", ["base", "parent_adapter", "data_sha256", "dtype"])
def test_a_manifest_that_lacks_a_part_is_one_line(copied, missing):
    manifest = json.loads((copied / "manifest.json").read_text())
    (manifest if missing in manifest else manifest["base"]).pop(missing)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json lacks a hash of the run's base"):
        reopen(copied, pytest.fail)


def test_a_precision_that_nobody_knows_is_as_good_as_none(copied):
    environment = copied / "environment.json"
    environment.write_text(json.dumps({**json.loads(environment.read_text()), "precision": "int8"}))
    opened = reopen(copied, pytest.fail)
    assert opened.placement.precision == "fp32" and "the run computed in int8" in opened.moved


def test_a_folder_without_its_environment_goes_by_its_configuration(copied):
    (copied / "environment.json").unlink()
    opened = reopen(copied, pytest.fail)
    assert opened.placement.precision == "fp32" and "environment.json does not name" in opened.moved
    assert opened.load(opened.folder.adapter).policy.placement.precision == "fp32"


# Frozen adapter and rows


def test_a_frozen_adapter_that_is_missing_is_an_error_everywhere(cli, copied, tmp_path):
    shutil.rmtree(copied / "parent")
    for command in (
        ("inspect", copied, "--step", 2),
        ("merge", copied, "--out", tmp_path / "merged"),
        ("generate", copied, "--prompt", "a"),
        ("verify", copied),
        ("replay", copied, "--step", 2),
    ):
        said = cli(*command)
        assert (said.code, said.err.count("\n")) == (4, 1)
        assert "parent is missing: the frozen adapter of this run" in said.err


def test_rows_are_read_when_they_are_asked_for_and_must_be_those_of_the_run(runs, cli, tmp_path):
    folder = runs.space.copy("sft", tmp_path)
    config = folder / "config.toml"
    config.write_text(re.sub(r'(?m)^source = ".*"', f'source = "{tmp_path / "rows.jsonl"}"', config.read_text()))
    assert reply(cli, folder) == reply(cli, runs.sft), "there are no rows to be read"
    helpers.write_jsonl(tmp_path / "rows.jsonl", CHATS[1:])
    opened = reopen(folder, pytest.fail)
    with pytest.raises(
        DataError, match="rows.jsonl: not the rows that .*sft trained on, so its steps cannot be rebuilt"
    ):
        opened.data()
    helpers.write_jsonl(tmp_path / "rows.jsonl", CHATS)
    tokenizer, data = opened.data()
    assert tokenizer.decode(data.train[0].input_ids).startswith("<|user|>")


def with_rows(folder, name: str, rows: list[dict]) -> None:
    """A run folder whose rows are another file."""
    path, config = helpers.write_jsonl(folder.parent / name, rows), folder / "config.toml"
    config.write_text(re.sub(r'(?m)^source = ".*"', f'source = "{path}"', config.read_text()))


def test_held_out_rows_must_be_those_of_the_run_and_the_others_need_not(cli, copied, tmp_path):
    """Both commands would measure rows of which nobody knows whether they were trained on."""
    merge, compare = ("merge", copied, "--out", tmp_path / "merged"), ("compare", copied, "--max-new-tokens", 2)
    with_rows(copied, "pairs.jsonl", [*PAIRS, {**PAIRS[0], "prompt": "one more"}])
    for command in (merge, compare):
        refused(cli(*command), 3, f"pairs.jsonl: not the rows that {copied} held out")
    assert not (tmp_path / "merged").exists() and not (copied / "compare.json").exists()
    with_rows(copied, "pairs.jsonl", [{**PAIRS[0], "chosen": "another"}, *PAIRS[1:]])
    for command in (merge, compare):
        said = cli(*command)
        assert said.code == 0, said.err


def test_a_merge_of_a_run_that_held_no_row_out_is_measured_on_those_that_it_trained_on(runs, cli, tmp_path):
    assert cli("sft", runs.space.write("all", "sft", folder=tmp_path, train={"max_steps": 1})).code == 0
    folder, merge = tmp_path / "all", ("merge", tmp_path / "all", "--out", tmp_path / "merged")
    with_rows(folder, "rows.jsonl", CHATS[1:])
    refused(cli(*merge), 3, f"rows.jsonl: not the rows that {folder} trained on")
    assert not (tmp_path / "merged").exists()
    with_rows(folder, "rows.jsonl", CHATS)
    said = cli(*merge)
    assert said.code == 0, said.err


def test_the_examples_of_a_step(runs):
    opened = reopen(runs.sft, pytest.fail)
    _, data = opened.data()
    rows = [[example.row for example in step_examples(opened.config, data, step)] for step in range(1, 7)]
    assert [len(one) for one in rows] == [4, 4, 4, 4, 2, 4], "18 rows an epoch"
    assert sorted(sum(rows[:5], [])) == sorted(example.row for example in data.train)
    for step in (0, 7):
        with pytest.raises(ConfigError, match=f"^--step {step}: the run has 6 steps$"):
            step_examples(opened.config, data, step)


# Memory


def test_a_forward_pass_recomputes_nothing_and_a_step_does_as_the_run_did(runs):
    opened = reopen(runs.sft, pytest.fail)
    assert opened.config.train.gradient_checkpointing
    forward, step = opened.policy(), opened.policy(training=True)
    assert forward.layers.recomputed == 0 and step.layers.recomputed == 2
    assert torch.equal(forward.flat.weights, step.flat.weights)


def test_embeddings_on_the_host_change_no_number(runs, cli, tmp_path):
    """They are there again for steps; forward passes, which `generate` makes, have them with the layers."""
    folders, held_out = {}, {"eval_source": "holdout", "eval_limit": 2}
    for on_host in (False, True):
        model = {"name": str(runs.space.base), "embeddings_on_host": on_host}
        name, train = f"host-{on_host}", {"max_steps": 2}
        file = runs.space.write(name, "sft", folder=tmp_path, model=model, data=held_out, train=train)
        assert cli("sft", file).code == 0
        folders[on_host] = tmp_path / name
    plain, hosted = (load_run(folders[on_host], pytest.fail).policy for on_host in (False, True))
    step = reopen(folders[True], pytest.fail).policy(folders[True] / "adapter", training=True)
    kinds = [isinstance(p.causal_lm.get_input_embeddings(), HostEmbedding) for p in (plain, hosted, step)]
    assert kinds == [False, False, True]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = plain.model(input_ids=ids).logits
        assert all(torch.equal(policy.model(input_ids=ids).logits, expected) for policy in (hosted, step))
    assert reply(cli, folders[True]) == reply(cli, folders[False])
    for command in (
        ("inspect", folders[True], "--step", 1),
        ("compare", folders[True], "--prompts", 1, "--max-new-tokens", 2),
        ("merge", folders[True], "--out", tmp_path / "merged"),
        ("verify", folders[True]),
        ("replay", folders[True], "--step", 2),
    ):
        said = cli(*command)
        assert said.code == 0, said.err
