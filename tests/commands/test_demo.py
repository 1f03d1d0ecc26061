"""What the built-in demo promises, on the questions that it holds out. Takes a minute or two: the slowest test here."""

import json
import os

import pytest
from rich.console import Console

from lowlevel.commands.demo import CHECK_ITEMS, run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with open(os.devnull, "w") as nowhere:
        result = run_demo(folder, Console(file=nowhere, width=140))
    return folder, result


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sft_learns_the_chat(demo):
    folder, result = demo
    evaluated = [record["eval_loss"] for record in metrics(folder / "sft") if "eval_loss" in record]
    assert evaluated[-1] <= 0.7 * evaluated[0]
    scores = result["scores"]
    assert scores["base"]["exact_match"] < 0.2
    assert scores["sft"]["exact_match"] > 0.7


def test_dpo_learns_the_style_and_keeps_the_answers(demo):
    folder, result = demo
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
    from lowlevel.demo.world import check_items, exact_match, preferred_style

    folder, result = demo
    written = json.loads((folder / "demo.json").read_text())
    assert written["scores"] == result["scores"]
    assert 0 < written["seconds"] < 480  # 4 minutes are promised on an otherwise idle machine
    items = check_items(CHECK_ITEMS, seed=0)
    for stage in ("base", "sft", "dpo"):
        texts = [reply["text"] for reply in written["replies"][stage]]
        assert len(texts) == CHECK_ITEMS
        found = sum(exact_match(text, item) for text, item in zip(texts, items, strict=True)) / CHECK_ITEMS
        assert written["scores"][stage]["exact_match"] == pytest.approx(found)
        polite = sum(preferred_style(text) for text in texts) / CHECK_ITEMS
        assert written["scores"][stage]["preferred_style"] == pytest.approx(polite)


def test_no_question_was_trained_on(demo):
    """The held-out questions share no prompt with what either run read."""
    from lowlevel.demo import world

    asked = {json.dumps(item.prompt) for item in world.check_items(CHECK_ITEMS, seed=0)}
    trained = {json.dumps(row["messages"][: len(row["messages"]) - 1]) for row in world.sft_rows("train", 2400, 0)}
    assert len(asked) > 0.8 * CHECK_ITEMS
    assert not asked & trained
