"""What the built-in demo promises, on questions that it holds out: a short demo, and with slow tests the full one."""

import json
import os

import pytest
from rich.console import Console

from lowlevel.commands import demo as command
from lowlevel.commands.demo import demo_configs, run_demo

SHORT = {"CHECK_ITEMS": 16, "limit": 160, "eval_limit": 16, "max_steps": 2}  # 10 steps of SFT, then 2 of DPO


def run_in(folder):
    with open(os.devnull, "w") as nowhere:
        return folder, run_demo(folder, Console(file=nowhere, width=140))


@pytest.fixture(scope="module")
def full_demo(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    def short_configs(out):
        sft, dpo = demo_configs(out)
        return shortened(sft, {"limit": SHORT["limit"]}, {}), shortened(dpo, {}, {"max_steps": SHORT["max_steps"]})

    def shortened(config, data, train):
        data = config.data.model_copy(update={"eval_limit": SHORT["eval_limit"], **data})
        return config.model_copy(update={"data": data, "train": config.train.model_copy(update=train)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "demo_configs", short_configs)
        patch.setattr(command, "CHECK_ITEMS", SHORT["CHECK_ITEMS"])
        return run_in(tmp_path_factory.mktemp("demo"))


@pytest.fixture(params=["short", pytest.param("full", marks=pytest.mark.slow)])
def demo(request):
    return request.getfixturevalue(f"{request.param}_demo")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sft_learns(demo):
    evaluated = [record["eval_loss"] for record in metrics(demo[0] / "sft") if "eval_loss" in record]
    assert evaluated[-1] <= 0.7 * evaluated[0]


@pytest.mark.slow
def test_sft_learns_the_chat(full_demo):
    scores = full_demo[1]["scores"]
    assert scores["base"]["exact_match"] < 0.2
    assert scores["sft"]["exact_match"] > 0.7


@pytest.mark.slow
def test_dpo_learns_the_style_and_keeps_the_answers(full_demo):
    folder, result = full_demo
    last = metrics(folder / "dpo")[-1]
    assert last["eval_rewards/accuracies"] > 0.9
    sft, dpo = result["scores"]["sft"], result["scores"]["dpo"]
    assert dpo["reward_accuracy"] == pytest.approx(last["eval_rewards/accuracies"], abs=0.011)  # one of 100 pairs a tie
    assert dpo["preferred_style"] > sft["preferred_style"]
    assert dpo["exact_match"] >= sft["exact_match"] - 0.03


def test_dpo_starts_at_ln_2(demo):
    first = metrics(demo[0] / "dpo")[0]
    assert (first["step"], first["eval_loss"]) == (0, pytest.approx(0.6931472, abs=1e-7))


def test_the_result_is_written_and_its_scores_are_those_of_its_replies(demo):
    from lowlevel.demo.world import exact_match, preferred_style, rows

    folder, result = demo
    written = json.loads((folder / "demo.json").read_text())
    assert written["scores"] == result["scores"]
    assert 0 < written["seconds"] < 480  # 4 minutes are promised on an otherwise idle machine
    count = len(written["replies"]["base"])
    assert count in (SHORT["CHECK_ITEMS"], command.CHECK_ITEMS)
    items = rows("check")[:count]
    for stage in ("base", "sft", "dpo"):
        texts = [reply["text"] for reply in written["replies"][stage]]
        assert len(texts) == count
        found = sum(exact_match(text, item["answer"]) for text, item in zip(texts, items, strict=True)) / count
        assert written["scores"][stage]["exact_match"] == pytest.approx(found)
        polite = sum(preferred_style(text) for text in texts) / count
        assert written["scores"][stage]["preferred_style"] == pytest.approx(polite)


def test_no_question_was_trained_on():
    """The held-out questions share no prompt with what either run read."""
    from lowlevel.demo import world

    asked = {json.dumps(item["prompt"]) for item in world.rows("check")}
    trained = {json.dumps(row["messages"][: len(row["messages"]) - 1]) for row in world.rows("sft-train")}
    assert len(asked) > 0.8 * command.CHECK_ITEMS
    assert not asked & trained
