"""The tokens before and in a reply are those of generation and of DPO, for the tokenizers of many model families."""

import random

import pytest
from tokenizer_families import FAMILIES

from lowlevel.data.rendering import APART, CROSSED

PIECES = (
    *(
        "There",
        "there",
        "a",
        "yes, no",
        "x = 1234",
        "naïve café",
        "\u0301",
        "e\u0301",
        "ﬁ",
        "😀",
        "👩‍👩‍👧",
        "你好",
        "가",
    ),
    *(
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "[INST]",
        "</s>",
        "▁",
        "<",
        "|>",
        "'s",
    ),
)


def text(rng: random.Random) -> str:
    words = "".join(rng.choice(PIECES) + rng.choice(("", "", " ")) for _ in range(rng.randint(1, 6)))
    return words if words.strip() else f"{words}."


def conversation(rng: random.Random) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * rng.randint(1, 3)
    return [{"role": role, "content": text(rng)} for role in roles]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reply_follows_the_tokens_that_generation_starts_from(family):
    """Each learned reply continues exactly the tokens of its own prompt; the last is learned, and as in DPO."""
    tokenizer, rng = FAMILIES[family](), random.Random(0)
    talks = [conversation(rng) for _ in range(100)]
    pairs = tokenizer.encode_pairs([(talk[:-1], talk[-1]["content"], "other") for talk in talks], "assistant")
    for talk, encoded, pair in zip(talks, tokenizer.encode_conversations(talks), pairs, strict=True):
        prompts = [tokenizer.encode_prompt(talk[:turn]) for turn in range(1, len(talk), 2)]
        contexts = [encoded.input_ids[:start] for start, _ in encoded.replies]
        assert contexts == [prompt for prompt in prompts if prompt in contexts] and contexts[-1] == prompts[-1]
        assert len(contexts) + encoded.warnings[CROSSED] == len(prompts)
        assert all(encoded.input_ids[end - 1] == tokenizer.end_of_turn_id for _, end in encoded.replies)
        start, end = encoded.replies[-1]
        assert (encoded.input_ids[:start], encoded.input_ids[start:end]) == (pair.prompt_ids, pair.chosen_ids)


def pieces(tokenizer, talk) -> tuple[list[str], list[list[str]]]:
    """Tokens of a conversation, and of each learned reply."""
    (encoded,) = tokenizer.encode_conversations([talk])
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    return tokens, [tokens[start:end] for start, end in encoded.replies]


TALK = [
    {"role": role, "content": text}
    for role, text in (("user", "a"), ("assistant", "There"), ("user", "b"), ("assistant", " There"))
]


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_trimmed_offsets_hide_no_token_that_crosses_a_boundary(family):
    """ "ĠThere" crosses the boundary after "ASSISTANT: "; with trim_offsets its offsets are those of "There"."""
    tokens, replies = pieces(FAMILIES[family](), TALK[:2])
    assert tokens[-5:] == ["ĠASSISTANT", ":", "Ġ", "There", "</s>"] and replies == [["There", "</s>"]]
    (encoded,) = FAMILIES[family]().encode_conversations([TALK])
    assert +encoded.warnings == {CROSSED: 1}  # before " There" the prompt's space is a token of its own
    (encoded,) = FAMILIES[family]().encode_conversations([TALK[:2]])
    assert +encoded.warnings == {APART: 1}


@pytest.mark.parametrize("family", ["phi 3", "both strip"])
def test_a_special_token_keeps_the_blanks_that_it_takes(family):
    """No newline token follows <|end|> or <|assistant|>, and " There" and "There" are one text."""
    tokenizer = FAMILIES[family]()
    tokens, replies = pieces(tokenizer, TALK)
    assert replies[0] == replies[1] and replies[0][-1] == "<|end|>"
    start = tokens.index("<|end|>", tokens.index("<|assistant|>"))
    assert tokens[start : start + 2] == ["<|end|>", "<|user|>"]
    (encoded,) = tokenizer.encode_conversations([TALK])
    assert not +encoded.warnings
    (pair,) = tokenizer.encode_pairs([(TALK[:3], " There", "There")], "assistant")
    assert pair.chosen_ids == pair.rejected_ids
