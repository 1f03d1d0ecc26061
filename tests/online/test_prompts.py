"""Rows as prompts: what the model is asked, and what reward functions compare its reply with."""

import json

import pytest

from lowlevel.config.file import config_from_tables
from lowlevel.data.prepare import ModelLimits, prepare
from lowlevel.data.tokenizer import load_chat_tokenizer
from lowlevel.model.base import resolve_name

ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
TALK = [*ASKED, {"role": "assistant", "content": "5"}, {"role": "user", "content": "And 2 + 4?"}]
REPLY = {"role": "assistant", "content": "6"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_chat_tokenizer(resolve_name("demo"), None, None)


def prompt_of(tokenizer, tmp_path, row, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    own = {"max_completion_length": 16}
    config = config_from_tables({"method": "grpo", "grpo": own, "data": {"source": str(path), **data}}, "test")
    return prepare(config, tokenizer, ModelLimits(len(tokenizer.tokenizer), 256)).train[0]


@pytest.mark.parametrize(
    ("row", "messages", "reference"),
    [
        ({"prompt": "What is 2 + 3?"}, ASKED, None),
        ({"prompt": TALK}, TALK, None),
        ({"prompt": TALK, "answer": "6", "level": 2}, TALK, "6"),
        ({"prompt": "What is 2 + 3?", "answer": "5"}, ASKED, "5"),
        ({"question": "What is 2 + 3?", "answer": 5.0}, ASKED, "5"),  # a number is compared as text
        ({"prompt": TALK, "answer": 6.25}, TALK, "6.25"),
        ({"prompt": TALK, "completion": [REPLY], "answer": "six"}, TALK, "6"),
        ({"messages": [*TALK, REPLY]}, TALK, "6"),
        ({"messages": TALK}, TALK, None),
        ({"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}, ASKED, "2 + 3 = 5\n#### 5"),
    ],
)
def test_formats(tokenizer, tmp_path, row, messages, reference):
    found = prompt_of(tokenizer, tmp_path, row)
    assert (found.messages, found.reference) == (messages, reference)
    assert found.prompt_ids.tolist() == tokenizer.encode_prompt(messages)
    assert {name: found.columns[name] for name in row} == row


def test_room_for_the_completion(tokenizer, tmp_path):
    size = len(tokenizer.encode_prompt(ASKED))
    assert len(prompt_of(tokenizer, tmp_path, {"prompt": ASKED}, max_length=size + 16).prompt_ids) == size
    with pytest.raises(
        Exception, match=f"1 of 1 longer than max_length {size + 15}; .*leaves {size - 1} beside 16 new"
    ):
        prompt_of(tokenizer, tmp_path, {"prompt": ASKED}, max_length=size + 15)
