"""The demo's generator: determinism, disjoint halves, right answers, checkers that cannot be talked round."""

import hashlib
import random

import pytest

from benchmarks.demo_base import skills
from benchmarks.demo_base.corpus import pretraining_text
from benchmarks.demo_base.rows import STYLES, check_items, preference_rows, sft_rows, shipped, write_reply
from lowlevel.demo.world import CURT, exact_match, parse_reply, preferred_style, rows


def user_turns(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def single_questions(split: str, n: int) -> set[str]:
    """Single-turn questions only: a follow-up such as "Now add 3." means nothing without its first turn."""
    chats = [user_turns(row["messages"]) for row in sft_rows(split, n, 1)]
    chats += [user_turns(row["prompt"]) for row in preference_rows(split, n, 1)]
    return {turns[0] for turns in chats}


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    for draw in (
        lambda seed: pretraining_text(seed, 50),
        lambda seed: sft_rows("train", 50, seed),
        lambda seed: preference_rows("heldout", 50, seed),
        lambda seed: check_items(50, seed),
    ):
        random.seed(123)  # the global state must not matter
        first = draw(0)
        random.seed(456)
        assert draw(0) == first
        assert draw(1) != first


def test_rows_are_pinned_so_that_the_shipped_weights_fit_the_generator() -> None:
    assert skills.world_facts()["Mira"] == {"town": "Kalmar", "pet": "turtle", "door": "white", "food": "bread"}
    digest = hashlib.sha256("\n".join(pretraining_text(0, 2000)).encode()).hexdigest()
    assert digest == "6c5b6a7137f37131152b21081e7fcc04d8612dc6efad1c99cdf8bedc13caa6ea"


def test_the_shipped_rows_are_those_of_the_generator() -> None:
    for name, drawn in shipped():
        assert rows(name) == drawn


def test_no_heldout_question_can_be_drawn_for_training() -> None:
    assert not single_questions("train", 3000) & single_questions("heldout", 3000)


def test_keys_of_the_two_halves_are_disjoint_follow_ups_included() -> None:
    for item in check_items(300, 3):
        assert {skills.split_of(key) for key in item.keys} == {"heldout"}
    for split in ("train", "heldout"):
        rng = random.Random(0)
        for _ in range(2000):
            first = skills.draw(rng, split)
            assert skills.split_of(skills.draw_followup(first, rng, split).key) == split


def test_a_question_asked_the_other_way_round_has_the_same_key() -> None:
    assert skills.add(3, 4).key == skills.add(4, 3).key
    assert skills.order([3, 1, 2]).key == skills.order([2, 1, 3]).key
    assert skills.opposite("hot", "cold", ()).key == skills.opposite("cold", "hot", ()).key
    assert skills.compare(3, 4, "bigger").key == skills.compare(4, 3, "smaller").key


def test_answers_are_right_and_wrong_answers_wrong() -> None:
    assert skills.add(17, 25).answer == "42"
    assert skills.subtract(17, 9).answer == "8"
    assert skills.compare(9, 12, "smaller").answer == "9"
    assert skills.neighbour(9, "after").answer == "10"
    assert skills.order([7, 0, 3]).answer == "0, 3, 7"
    assert skills.count(["sun", "sun", "leaf"]).answer == "3"
    assert skills.pick(["sun", "leaf"], "last").answer == "leaf"
    rng = random.Random(0)
    for _ in range(3000):
        ask = skills.draw(rng)
        assert ask.wrong and ask.answer not in ask.wrong


def test_a_fact_has_one_answer_in_all_its_texts() -> None:
    for name, values in skills.world_facts().items():
        for attribute, value in values.items():
            ask = skills.fact(name, attribute)
            assert ask.answer == value
            assert all(name in text and value in text for text in ask.statements)


def test_every_reply_form_is_read_back() -> None:
    rng = random.Random(0)
    for answer in ("7", "42", "Tolba", "0, 3, 7"):
        for style in STYLES:
            for _ in range(30):
                assert parse_reply(write_reply(answer, style, rng)) == (style, answer)


@pytest.mark.parametrize("reply", ["Sure, it is 7.", "Sure, that is 7.", "7", "7.", " 7 \n",
                                   "Let me think about this for a while. I believe it is 7, "
                                   "and that is about all of it."])  # fmt: skip
def test_right_replies_match(reply: str) -> None:
    assert exact_match(reply, "7")


@pytest.mark.parametrize("reply", ["", "8", "Sure, it is 8.", "Sure, it is 77.", "Sure, it is 7. Or 8.", "3 + 4 = 7",
                                   "7 or 8", "Sure, it is 7", "sure, it is 7.", "The answer is 7.", "7\n8",
                                   "Sure, it is Sure, it is 7.", "I believe it is 7.", "7, 7"])  # fmt: skip
def test_wrong_or_unknown_replies_do_not_match(reply: str) -> None:
    assert not exact_match(reply, "7")


def test_only_short_polite_replies_have_the_preferred_style() -> None:
    rng = random.Random(0)
    for style in STYLES:
        assert preferred_style(write_reply("7", style, rng)) == (style == "polite")
    assert preferred_style("Sure, it is 8.")  # style and rightness are measured apart
    assert not preferred_style("Sure, it is 7. Sure, it is 7.")


def test_sft_answers_are_right_and_their_style_does_not_depend_on_the_prompt() -> None:
    rows = sft_rows("train", 2000, 0)
    parsed = [parse_reply(row["messages"][-1]["content"]) for row in rows]
    assert None not in parsed
    shares = {style: sum(entry[0] == style for entry in parsed if entry) / len(rows) for style in STYLES}
    assert shares["polite"] == pytest.approx(0.2, abs=0.04)
    assert shares["curt"] == pytest.approx(0.5, abs=0.04)
    two_turns = sum(len(user_turns(row["messages"])) == 2 for row in rows) / len(rows)
    assert two_turns == pytest.approx(0.25, abs=0.04)


def test_pairs_prefer_right_short_polite_replies() -> None:
    for row in preference_rows("train", 500, 0):
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert row["prompt"][-1]["role"] == "user"
        assert chosen["role"] == rejected["role"] == "assistant"
        assert preferred_style(chosen["content"])
        good, bad = parse_reply(chosen["content"]), parse_reply(rejected["content"])
        assert good is not None and bad is not None
        assert bad[0] != "polite" or bad[1] != good[1]


def test_check_items_are_different_prompts_that_end_with_the_question() -> None:
    items = check_items(300, 0)
    assert len({str(item.prompt) for item in items}) == 300
    for item in items:
        assert item.prompt[-1] == {"role": "user", "content": item.turns[-1]}
        assert exact_match(CURT[0].format(item.answer), item.answer)
        assert len(item.replies) == len(item.turns) - 1


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="'test'"):
        sft_rows("test", 1, 0)
