"""`lowlevel inspect` on real runs: which rows, which weights, and the loss that the run logged."""

import json
import shutil
from types import SimpleNamespace

import helpers
import pytest
import torch
from samples import STEPS
from workspace import CHATS, PAIRS, metrics, run

from lowlevel.config.schema import RunConfig
from lowlevel.errors import CheckpointError, ConfigError, DataError
from lowlevel.inspection.opening import inspect_run
from lowlevel.running.reopening import reopen


def look(folder, **keys):
    return inspect_run(reopen(folder, lambda line: None), **keys)


def logged(folder, step: int) -> dict:
    (record,) = (record for record in metrics(folder) if record["step"] == step and "loss" in record)
    return record


# The loss of a step is the one that was logged


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_conversation_step_has_the_loss_that_was_logged(runs, step):
    found = look(runs.sft, step=step)
    assert found.loss == pytest.approx(logged(runs.sft, step)["loss"], abs=1e-5)
    assert found.count == sum(len(record.texts[0].scored) for record in found.examples)
    assert found.logged == f"logged: {logged(runs.sft, step)['loss']:.6f}"


@pytest.mark.parametrize("name", ["dpo", "ipo"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_preference_step_has_the_numbers_that_were_logged(runs, name, step):
    folder = {"dpo": runs.dpo, "ipo": runs.ipo}[name]
    found, record = look(folder, step=step), logged(folder, step)
    mean = {
        "loss": [pair.loss for pair in found.examples],
        "rewards/margins": [pair.numbers["margin"] for pair in found.examples],
        "rewards/chosen": [pair.texts[0].numbers["reward"] for pair in found.examples],
        "logps/rejected": [pair.texts[1].numbers["policy"] for pair in found.examples],
        "logps/ref_chosen": [pair.texts[0].numbers["reference"] for pair in found.examples],
    }
    for key, values in mean.items():
        assert sum(values) / len(values) == pytest.approx(record[key], rel=1e-5, abs=1e-5), key
    assert found.loss == pytest.approx(record["loss"], rel=1e-6, abs=1e-5)
    for pair in found.examples:
        added = float(pair.texts[0].columns["adds"].sum() + pair.texts[1].columns["adds"].sum())
        assert added == pytest.approx(pair.numbers["averaged margin" if name == "ipo" else "margin"], abs=1e-5)


def test_steps_hold_the_rows_of_an_epoch(runs):
    """24 rows, 4 a step, 5 steps: no row twice; the texts are those of the file."""
    found = [look(runs.sft, step=step) for step in range(1, STEPS + 1)]
    rows = [record.row for inspection in found for record in inspection.examples]
    assert len(rows) == len(set(rows)) == 4 * STEPS
    for record in found[0].examples:
        text = found[0].pieces.decode(record.texts[0].token_ids)
        assert CHATS[record.row]["messages"][1]["content"] + "</s>" == text
        assert record.where == f"chats.jsonl:{record.row + 1}"


# Which weights


@pytest.mark.parametrize(
    "keys, line",
    [
        ({"step": 1}, "adapter as initialised, the weights before step 1"),
        ({"step": 3}, "step-00000002, the weights before step 3"),
        ({"step": 3, "checkpoint": 1}, "step-00000001, 1 update before step 3 began"),
        ({"step": 5, "checkpoint": 1}, "step-00000001, 3 updates before step 5 began"),
        ({"step": 3, "checkpoint": 0}, "adapter as initialised, 2 updates before step 3 began"),
        ({"step": 3, "checkpoint": 4}, "step-00000004, already trained on step 3"),
        ({"example": 7}, "final adapter"),
        ({"example": 7, "checkpoint": 2}, "step-00000002"),
        ({"example": 7, "checkpoint": 0}, "adapter as initialised, before the first step"),
    ],
)
def test_the_weights_are_named(runs, keys, line):
    found = look(runs.dpo, **keys)
    assert found.weights == line
    assert found.conditions == f"weights: {line}; dropout off"


def test_a_row_is_the_same_in_a_step_and_alone(runs):
    step = look(runs.dpo, step=4)
    alone = look(runs.dpo, example=step.examples[1].row, checkpoint=3)
    assert float(alone.examples[0].numbers["margin"]) == pytest.approx(
        float(step.examples[1].numbers["margin"]), abs=1e-5
    )
    assert (alone.subject, step.subject) == (f"row {step.examples[1].row}", "step 4")
    assert alone.pieces.decode(alone.examples[0].texts[0].token_ids) == PAIRS[alone.examples[0].row]["chosen"] + "</s>"


def test_the_final_adapter_is_the_last_checkpoint(runs):
    final, last = look(runs.dpo, example=3), look(runs.dpo, example=3, checkpoint=STEPS)
    assert torch.equal(final.examples[0].texts[0].columns["policy"], last.examples[0].texts[0].columns["policy"])
    (earlier,) = look(runs.dpo, example=3, checkpoint=2).examples
    assert final.examples[0].texts[0].numbers["policy"] != earlier.texts[0].numbers["policy"]


def test_before_the_first_step_policy_and_reference_are_equal(runs):
    for pair in look(runs.dpo, step=1).examples:
        assert torch.equal(pair.texts[0].columns["policy"], pair.texts[0].columns["reference"])
        assert float(pair.numbers["margin"]) == 0 and float(pair.loss) == pytest.approx(0.6931472)
        assert not pair.running("adds").any()


@pytest.fixture
def copied(runs, tmp_path):
    return shutil.copytree(runs.dpo, tmp_path / "dpo")


def test_a_step_without_its_checkpoint_takes_an_older_one_and_says_so(copied):
    for name in ("step-00000003", "step-00000002"):
        shutil.rmtree(copied / name)
    assert look(copied, step=4).weights == "step-00000001, 2 updates before step 4 began"
    shutil.rmtree(copied / "step-00000001")
    assert look(copied, step=4).weights == "final adapter (no checkpoint at or before step 3 is left)"
    assert look(copied, step=1).weights == "adapter as initialised, the weights before step 1"


def test_an_unfinished_run_can_be_looked_at(copied):
    shutil.rmtree(copied / "adapter")
    newest = "step-00000005, the newest checkpoint: the run has not finished"
    assert look(copied, example=7).weights == newest
    for number in (1, 2, 3):
        shutil.rmtree(copied / f"step-0000000{number}")
    with pytest.raises(ConfigError, match="its first checkpoint is that of step 4: add --checkpoint 4, or"):
        look(copied, step=4)
    for path in copied.glob("step-*"):
        shutil.rmtree(path)
    assert look(copied, step=1).weights == "adapter as initialised, the weights before step 1"
    for keys in ({"step": 2}, {"example": 7}):
        with pytest.raises(ConfigError, match="no saved weights yet.* --checkpoint 0"):
            look(copied, **keys)
    assert look(copied, step=2, checkpoint=0).weights.startswith("adapter as initialised")


def test_a_run_that_goes_on_from_an_adapter_began_with_it(runs, tmp_path):
    space, adapter = runs.space, runs.sft / "adapter"
    train = {"max_steps": 1, "logging_steps": 1}
    lora = {"init_from": str(adapter), "r": None, "lora_alpha": None, "lora_dropout": 0.0}
    file = space.write("more", "sft", folder=tmp_path, train=train, lora=lora)
    assert run("sft", file).code == 0
    more = look(tmp_path / "more", step=1)
    assert more.loss == pytest.approx(logged(tmp_path / "more", 1)["loss"], abs=1e-5)
    fresh = look(runs.sft, example=more.examples[0].row, checkpoint=0)
    assert abs(float(more.examples[0].loss - fresh.examples[0].loss)) > 1e-3


# The log


def test_the_logged_loss_says_over_what_it_is_a_mean(runs, copied):
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [record for record in lines if record["step"] in (2, 4)]
    kept.insert(1, {"step": 3, "eval_loss": 9.0})
    helpers.write_jsonl(copied / "metrics.jsonl", kept)
    assert look(copied, step=4).logged == f"logged: {kept[-1]['loss']:.6f}, the mean of steps 3 to 4"
    assert look(copied, step=3).logged is None
    config = copied / "config.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("disable_dropout = true", "disable_dropout = false"))
    assert look(copied, step=2).logged.endswith(", the mean of steps 1 to 2, with dropout 0.1")


# What cannot be inspected


def test_rows_and_steps_that_are_not_there(runs):
    with pytest.raises(ConfigError, match=r"--step 6: the run has 5 steps"):
        look(runs.dpo, step=6)
    with pytest.raises(DataError, match=r"row 24: .*pairs.jsonl has the rows 0 to 23"):
        look(runs.dpo, example=24)
    with pytest.raises(
        ConfigError, match=r"--checkpoint 9: .* has no such checkpoint; there are: 1, 2, 3, 4, 5, and 0 for the start"
    ):
        look(runs.dpo, step=2, checkpoint=9)


def test_a_row_that_gave_no_example_says_why(runs, tmp_path):
    rows = [{**row, "score": i} for i, row in enumerate(PAIRS[:12])]
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[3]["prompt"] = "x" * 400
    rows[3]["chosen"], rows[3]["rejected"] = "y" * 400 + "a", "y" * 400 + "b"
    space = runs.space
    helpers.write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {
        "source": str(tmp_path / "rows.jsonl"),
        "on_bad_row": "skip",
        "filters": [{"column": "score", "op": "!=", "value": 5}],
        "eval_source": "holdout",
        "eval_limit": 2,
        "limit": 6,
    }
    file = space.write("odd", "dpo", folder=tmp_path, data=data, train={"max_steps": 1})
    said = run("dpo", file)
    assert said.code == 0, said.err
    expected = {
        2: r"row 2 \(rows.jsonl:3\) was dropped, so it was not trained on: chosen",
        3: r"row 3 \(rows.jsonl:4\) was dropped, so it was not trained on: chosen and rejected are the same after",
        5: r"row 5 \(rows.jsonl:6\) was filtered out by data.filters",
        11: r"row 11 is held out for evaluation",
        9: r"row 9 \(rows.jsonl:10\) was left out by data.limit = 6",
    }
    for row, message in expected.items():
        with pytest.raises(DataError, match=message) as error:
            look(tmp_path / "odd", example=row)
        assert "\n" not in str(error.value)
    assert look(tmp_path / "odd", example=4).examples[0].row == 4


def test_a_damaged_checkpoint_that_was_named_is_refused(copied):
    (copied / "step-00000003" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="does not match the manifest; choose another checkpoint"):
        look(copied, step=4, checkpoint=3)
    assert look(copied, step=4, checkpoint=2).weights.startswith("step-00000002")


def test_a_damaged_checkpoint_is_passed_over_with_a_line(copied):
    for number in (3, 5):
        (copied / f"step-0000000{number}" / "adapter_model.safetensors").write_bytes(b"x")
    said = run("inspect", copied, "--step", 4)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"skipped a damaged checkpoint: {copied}/step-00000003/") and said.out.count("skip") == 1
    assert "weights: step-00000002, 1 update before step 4 began" in said.out
    shutil.rmtree(copied / "adapter")
    said = run("inspect", copied, "--example", 7)
    assert said.code == 0 and f"skipped a damaged checkpoint: {copied}/step-00000005/" in said.out
    assert "weights: step-00000004, the newest checkpoint: the run has not finished" in said.out


def test_where_every_checkpoint_is_damaged_it_says_so(copied):
    for path in copied.glob("step-*"):
        (path / "adapter_model.safetensors").write_bytes(b"x")
    assert look(copied, step=4).weights == "final adapter (no checkpoint at or before step 3 is left)"
    shutil.rmtree(copied / "adapter")
    with pytest.raises(CheckpointError, match="no usable checkpoint before step 4; --checkpoint 0 uses"):
        look(copied, step=4)
    with pytest.raises(CheckpointError, match="no usable checkpoint among 5"):
        look(copied, example=7)


def test_data_that_changed_since_the_run_is_refused(runs, tmp_path):
    folder = shutil.copytree(runs.dpo, tmp_path / "dpo")
    rows = helpers.write_jsonl(tmp_path / "pairs.jsonl", [*PAIRS[:-1], {**PAIRS[-1], "chosen": "other"}])
    config = folder / "config.toml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(runs.space.dpo_rows), str(rows)))
    with pytest.raises(DataError, match="not the rows that .* trained on"):
        look(folder, step=2)


# The command line


def test_what_the_command_prints(runs):
    said = run("inspect", runs.dpo, "--step", 3)
    assert (said.code, said.err) == (0, "")
    first, second, third = said.out.splitlines()[:3]
    assert first == "dpo, step 3: 4 pairs, sigmoid, β 0.1"
    assert second == "weights: step-00000002, the weights before step 3; dropout off"
    loss = logged(runs.dpo, 3)["loss"]
    assert third == f"loss {loss:.6f} (logged: {loss:.6f})"


def test_a_page_takes_the_place_of_the_tables(runs, tmp_path):
    said = run("inspect", runs.sft, "--step", 2, "--html", tmp_path / "page.html")
    assert (said.code, said.err) == (0, "")
    assert f"page written to {tmp_path / 'page.html'}" in said.out
    assert "likeliest others" not in said.out
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    "words, text",
    [
        (("--step", "1", "--example", "2"), "not allowed with"),
        ((), "one of the arguments --step --example is required"),
        (("--step", "0"), "got '0'"),
        (("--example", "-1"), "got '-1'"),
        (("--step", "1", "--checkpoint", "-2"), "got '-2'"),
    ],
)
def test_arguments_that_make_no_sense(runs, words, text):
    said = run("inspect", runs.dpo, *words)
    assert said.code == 2 and text in said.err


def test_errors_are_one_line(runs, tmp_path, monkeypatch):
    for words, code, text in (
        ((tmp_path, "--step", 1), 2, "is not a run folder"),
        ((runs.dpo, "--step", 99), 2, "the run has 5 steps"),
        ((runs.dpo, "--example", 99), 3, "has the rows 0 to 23"),
        ((runs.dpo, "--step", 1, "--html", tmp_path / "no" / "page.html"), 2, "no such folder"),
        ((runs.dpo, "--step", 1, "--html", tmp_path), 2, f"--html {tmp_path}: a folder"),
    ):
        said = run("inspect", *words)
        assert said.code == code and text in said.err and said.err.count("\n") == 1, said.err


def test_every_option_is_passed_on(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "lowlevel.running.reopening.reopen", lambda folder, note: SimpleNamespace(path=folder, config=RunConfig())
    )
    monkeypatch.setattr(
        "lowlevel.inspection.opening.inspect_run", lambda *args, **keys: seen.append((args[0].path, keys))
    )
    monkeypatch.setattr("lowlevel.inspection.terminal.print_inspection", lambda *_, details: seen.append(details))
    monkeypatch.setattr("lowlevel.inspection.page.write_page", lambda _, file: seen.append(file))
    run("inspect", tmp_path, "--step", 4, "--checkpoint", 0, "--html", tmp_path / "x.html")
    run("inspect", tmp_path, "--example", 0)
    assert seen == [
        (tmp_path, {"step": 4, "example": None, "checkpoint": 0}), False, tmp_path / "x.html",
        (tmp_path, {"step": None, "example": 0, "checkpoint": None}), True,
    ]  # fmt: skip


def test_an_inspection_is_a_function_of_a_reopened_run(runs):
    opened = reopen(runs.dpo, lambda line: None)
    found = inspect_run(opened, step=3)
    assert repr(found) == str(found) == "\n".join((found.headline, found.conditions, found.result))
    assert found.examples[0].texts[0].columns["policy"].shape == found.examples[0].texts[0].token_ids.shape
    for keys in ({}, {"step": 1, "example": 2}):
        with pytest.raises(ConfigError, match="either a step or an example"):
            inspect_run(opened, **keys)
