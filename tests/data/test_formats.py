"""Row formats: recognised by their columns, read as the same messages; transcripts, marks and tool calls."""

import json

import pytest

from lowlevel.data.formats import recognised
from lowlevel.data.messages import normalise
from lowlevel.data.report import DOUBLE_END
from lowlevel.data.rows import Row, SourceRows
from lowlevel.data.texts import BadRow
from lowlevel.data.tokenizer import chat_tokenizer
from lowlevel.data.turns import DECODED, MASKED
from lowlevel.errors import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather"}}
# As Qwen's: tools in a system turn, calls as JSON.
CALLING = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(row, method="sft", name="auto"):
    """The row as messages, and how its source is read."""
    source = recognised(SourceRows("x", [Row(0, "x:1", row)]), name, method)
    return normalise(source.rows[0]), source.read_as


def turns(*texts, **last):
    """Alternating messages; keys of the last one."""
    found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*found[:-1], found[-1] | last]


def shared(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


def system(text, messages):
    return [{"role": "system", "content": text}, *messages]


def hh(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


TALK, PAIR = turns("q", "a"), {"chosen": "a", "rejected": "b"}
SHARED = shared(("human", "q"), ("gpt", "a"))
ROWS = {  # row, messages, read as
    "text": ({"prompt": "q", "completion": "a"}, TALK, ""),
    "lists": ({"prompt": TALK[:1], "completion": TALK[1:]}, TALK, ""),
    "text and list": ({"prompt": "q", "completion": TALK[1:]}, TALK, ""),
    "one message": ({"prompt": TALK[:1], "completion": TALK[1]}, TALK, ""),
    "whole completion": ({"prompt": TALK[:1], "completion": TALK}, TALK, ""),
    "messages": ({"messages": TALK, "prompt": "q"}, TALK, ""),
    "null messages": ({"messages": None, "prompt": "q", "completion": "a"}, TALK, ""),
    "ShareGPT": ({"conversations": SHARED, "system": "s"}, system("s", TALK), "ShareGPT: conversations, system"),
    "ShareGPT in messages": ({"messages": SHARED}, TALK, "ShareGPT: messages"),
    "conversations": ({"conversations": TALK}, TALK, "lists of messages: conversations"),
    "other roles": ({"messages": [{"role": "Human", "content": "q"}, {"role": "model", "content": "a"}]}, TALK, ""),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, *TALK]}, system("s", TALK), ""),
    "empty system": ({"messages": system(" ", TALK)}, TALK, ""),
    "parts": ({"messages": turns([{"type": "text", "text": "q", "image": None}], "a")}, TALK, ""),
    "two parts": ({"messages": turns([{"type": "text", "text": t} for t in "qr"], "a")}, turns("qr", "a"), ""),
    "JSON text": ({"messages": json.dumps(TALK)}, TALK, ""),
    "Python text": ({"conversations": str(SHARED)}, TALK, None),
    "Alpaca": (
        {"instruction": "i", "input": "x", "output": "a"},
        turns("i\n\nx", "a"),
        "Alpaca: instruction, output, input (instruction and input joined by a blank line)",
    ),
    "history": ({"instruction": "q", "input": "", "output": "a", "history": [["1", "2"]]}, turns(*"12qa"), None),
    "Dolly": ({"instruction": "i", "context": "c", "response": "a", "category": "x"}, turns("i\n\nc", "a"), None),
    "question": ({"question": "q", "answer": "a"}, TALK, "question and answer: question, answer"),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, system("s", TALK), None),
    "query": ({"query": "q", "response": "a"}, TALK, "question and answer: query, response"),
    "input": ({"input": "q", "output": "a"}, TALK, "question and answer: input, output"),
    "a JSON answer": ({"prompt": "q", "completion": '{"value": 1}'}, turns("q", '{"value": 1}'), ""),
    "a short prompt repeated": ({"prompt": "Hi", "completion": "Hi there"}, turns("Hi", "Hi there"), ""),
    "a corrected sentence": ({"prompt": "I like dogs", "completion": "I like dogs."}, None, ""),
    "a text about humans": ({"prompt": "q", "completion": "Human: a species."}, turns("q", "Human: a species."), ""),
}  # fmt: skip
PAIRS = {  # row, messages of the prompt, read as
    "text": ({"prompt": "q", **PAIR}, TALK[:1], ""),
    "implicit": ({"chosen": TALK, "rejected": turns("q", "b")}, TALK[:1], ""),
    "UltraFeedback": ({"prompt": "q\n", "chosen": TALK, "rejected": turns("q", "b"), "messages": TALK}, TALK[:1], ""),
    "texts of lists": ({"prompt": "q", "chosen": json.dumps(TALK), "rejected": str(turns("q", "b"))}, TALK[:1], ""),
    "question": ({"question": "q", **PAIR}, TALK[:1], "question and pair: question, chosen, rejected"),
    "question with system": ({"question": "q", "system": "s", **PAIR}, system("s", TALK[:1]), None),
    "Orca": ({"system": "", "input": "q", **PAIR}, TALK[:1], "Orca: system, input, chosen, rejected"),
    "Alpaca": ({"instruction": "i", "input": "x", **PAIR}, turns("i\n\nx"), None),
    "ShareGPT": (
        {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": {"from": "gpt", "value": "b"}},
        TALK[:1],
        "ShareGPT pairs: conversations, chosen, rejected",
    ),
    "messages": ({"messages": TALK[:1], "chosen": TALK[1], "rejected": turns("q", "b")[1]}, TALK[:1], None),
    "HH": ({"chosen": hh(*"q1ra"), "rejected": hh(*"q1rb")}, turns(*"q1r"), "HH transcripts: chosen, rejected"),
    "HH with prompt": ({"prompt": hh("q", "")[:-1], "chosen": hh("q", "a"), "rejected": hh("q", "b")}, TALK[:1], None),
    "HH replies": ({"prompt": hh("q", "")[:-1], "chosen": " a", "rejected": " b"}, TALK[:1], None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_conversation_in_each_format(name):
    row, messages, read_as = ROWS[name]
    messages = messages or turns(row["prompt"], row["completion"])
    found, said = read(row)
    assert found.messages == messages
    assert read_as is None or said == read_as
    plain = {"messages": messages}
    assert found.digest == read(plain)[0].digest, "the format changes no hash"


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_in_each_format(name):
    row, prompt, read_as = PAIRS[name]
    found, said = read(row, "dpo")
    assert (found.messages, found.completions) == (prompt, ("a", "b"))
    assert read_as is None or said == read_as
    assert found.digest == read({"prompt": prompt, **PAIR}, "dpo")[0].digest


LONG = "What is the capital of France?"
REFUSED = [  # method, row, reason, text of the message
    ("sft", {"prompt": LONG, "completion": f"{LONG} Paris"}, "prompt repeated in the reply", "give the reply alone"),
    ("dpo", {"prompt": LONG, "chosen": f"{LONG} A", "rejected": f"{LONG}\nB"}, "prompt repeated in the reply", "begin"),
    ("sft", {"prompt": hh("q", "")[:-1], "completion": "a"}, "chat template in text", "give the messages alone"),
    ("sft", {"prompt": "q", "completion": hh("q", "a")}, "transcript", "give a list of messages"),
    ("sft", {"prompt": "<|im_start|>user\nq<|im_end|>\n", "completion": "a"}, "chat template in text", "the messages"),
    ("sft", {"prompt": "Do this.\n\n### Response:", "completion": "a"}, "chat template in text", "### Response"),
    ("dpo", {"prompt": "q", "chosen": "[INST] q [/INST] a", "rejected": "b"}, "chat template in text", '"chosen"'),
    ("sft", {"messages": str(TALK).replace("},", "}\n")}, "transcript", "neither JSON nor Python"),
    ("dpo", {"prompt": "q", "chosen": json.dumps(TALK)[:-2], "rejected": "b"}, "transcript", "neither JSON nor Python"),
    ("sft", {"question": "q", "answer": json.dumps(TALK)}, "transcript", "expected one message"),
    ("dpo", {"chosen": hh("q", "a"), "rejected": hh("r", "b")}, "no common prompt", "(turn 1)"),
    ("dpo", {"chosen": hh("q", "a"), "rejected": hh("q", "a", "r")}, "empty rejected", "does not end with an answer"),
    ("dpo", {"prompt": turns("z"), "chosen": TALK, "rejected": TALK}, "completion is not one reply", "turn 1 of"),
    ("sft", {"prompt": "q", "completion": "a", "label": False}, "not to be learned", "label == true"),
    ("sft", {"prompt": "q", "completion": "a", "label": 0}, "not to be learned", "label == true"),
    ("sft", {"messages": TALK, "weight": 0}, "not to be learned", "weight > 0"),
    ("sft", {"messages": turns("q", "a", train=0.5)}, "unclear weight", '"train" (turn 2) is 0.5, expected 1 or 0'),
    ("sft", {"messages": turns("q", "a", weight=2e6)}, "unclear weight", "is 2000000.0, expected 1 or 0"),
    ("dpo", {"prompt": "q", "chosen": {**TALK[1], "weight": 0.5}, "rejected": "b"}, "unclear weight", "weight of 0.5"),
    ("dpo", {"prompt": [*turns("q", "a", weight=2), *turns("r")], **PAIR}, "unclear weight", "prompt has a weight"),
    ("kto", {"messages": turns("q", "a", weight=0.5), "label": True}, "unclear weight", "a reply has a weight of 0.5"),
    ("kto", {"messages": [*turns("q", "a", weight=3), *TALK], "label": True}, "unclear weight", "weights of repl"),
    ("sft", {"messages": turns("q", "a", weight=-1)}, "unclear weight", "is -1"),
    ("sft", {"messages": turns("q", "a", train=False)}, "not to be learned", "nothing to learn from"),
    ("dpo", {"prompt": "q", "chosen": {**TALK[1], "weight": 0}, "rejected": "b"}, "not to be learned", "weight 0"),
    ("sft", {"messages": turns([{"type": "image", "url": "x"}], "a")}, "part that is not text", 'type "image"'),
    ("sft", {"messages": turns("q", None, tool_calls=[{"function": {"arguments": "{}"}}])}, "tool call", "has no name"),
    ("sft", {"messages": turns("q", None, tool_calls=[{"name": "f", "arguments": "{"}])}, "tool call", "not JSON"),
    ("sft", {"conversations": SHARED, "system": 3}, "wrong type", '"system" is a number'),
    ("sft", {"conversations": [{"from": "narrator", "value": "q"}]}, "unknown role", 'role "narrator" (turn 1); known'),
    ("sft", {"instruction": "q", "output": "a", "history": ["x"]}, "history", "[question, answer]"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "row", "reason", "text"), REFUSED)
def test_a_row_that_is_refused(method, row, reason, text):
    with pytest.raises(BadRow) as caught:
        read(row, method)
    assert caught.value.reason == reason
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "row", "name", "text"),
    [
        ("sft", {"text": "hello"}, "auto", 'split it into "prompt" and "completion"'),
        ("sft", {"prompt": "q", **PAIR}, "auto", "they fit DPO (prompt, chosen, rejected)"),
        ("sft", {"question": "q", "reply": "a"}, "auto", "nearest: question, answer (missing: answer)"),
        (
            "sft",
            {"question": "q", "answer": "a", "response": "b"},
            "auto",
            "rename or remove the columns of others",
        ),
        ("sft", {"conversations": SHARED, "instruction": "q", "output": "a"}, "auto", 'to "sharegpt" or "alpaca"'),
        ("sft", {"dialogue": TALK}, "auto", 'rename "dialogue", a list of messages, to "messages"'),
        ("sft", {"messages": TALK}, "alpaca", 'they fit data.format = "messages"'),
        ("dpo", PAIR, "auto", "nearest: prompt, chosen, rejected (missing: prompt)"),
    ],
)
def test_columns_of_no_format_or_of_several(method, row, name, text):
    with pytest.raises(DataError) as caught:
        read(row, method, name)
    assert str(caught.value).startswith("x: ")
    assert text in str(caught.value)


def test_data_format_overrides_what_the_columns_say():
    row = {"conversations": SHARED, "instruction": "i", "output": "o"}
    assert read(row, name="sharegpt")[0].messages == TALK
    assert read(row, name="alpaca")[0].messages == turns("i", "o")
    with pytest.raises(BadRow, match="is a transcript"):
        read({"prompt": "q", "chosen": hh("q", "a"), "rejected": hh("q", "b")}, "dpo", "preference")


def test_how_rows_are_read_is_reported(run, write):
    path = write({"instruction": "q", "output": "a"}, {"instruction": "q", "output": json.dumps(TALK)[:-1]})
    report = run(path, "auto", method="sft", on_bad_row="skip").report
    assert (report.format, report.train.read_as) == ("alpaca", "Alpaca: instruction, output")
    assert list(report.train.dropped) == ["transcript"]
    assert run(write({"messages": json.dumps(TALK)}), "auto", method="sft").report.train.warnings == {DECODED: 1}


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"masked": True}]
)
@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_a_marked_reply_is_context(run, write, chatml, mark, supervise):
    marked = [*turns("q", "secret", **mark), *turns("r", "learned", weight=1)]
    data = run(write({"messages": marked}), supervise=supervise)
    example, plain = data.train[0], run(write({"messages": turns("q", "secret", "r", "learned")})).train[0]
    assert example.input_ids.tolist() == plain.input_ids.tolist()
    learned = chatml.decode(example.labels[example.labels >= 0].tolist())
    assert "secret" not in learned and "learned<|im_end|>" in learned
    assert ("user" in learned) == (supervise == "all")
    assert data.report.train.warnings == {MASKED: 1}


def test_a_reply_in_the_prompt_column_is_context(run, write, chatml):
    example = run(write({"prompt": turns("q", "earlier", "r"), "completion": "a"})).train[0]
    assert chatml.decode(example.labels[example.labels >= 0].tolist()) == "a<|im_end|>"


@pytest.mark.parametrize("content", [None, "", "I look."])
@pytest.mark.parametrize("arguments", [{"city": "Rome", "unit": None}, '{"city": "Rome"}'])
def test_tool_calls_and_tools_are_written_by_the_template(run, write, chatml, content, arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    asked = [*turns("q", content, tool_calls=[call]), {"role": "tool", "name": "weather", "content": "sunny"}]
    row = {"messages": [*asked, *turns("", "It is sunny.")[1:]], "tools": json.dumps([TOOL])}
    tokenizer = chat_tokenizer(chatml.tokenizer, CALLING)
    data = run(write(row), tokenizer=tokenizer)
    example = data.train[0]
    written = f"{content or ''}<call>{json.dumps(CALL['function'])}</call><|im_end|>It is sunny.<|im_end|>"
    assert tokenizer.decode(example.labels[example.labels >= 0].tolist()) == written
    assert tokenizer.decode(example.input_ids.tolist()).startswith(f"<|im_start|>system\n{json.dumps(TOOL)}<|im_end|>")
    assert data.report.train.warnings == {}
    pairs = {"prompt": turns("q"), "chosen": asked[1:2], "rejected": "no", "tools": [TOOL]}
    pair = run(write(pairs), "auto", method="dpo", tokenizer=tokenizer).train[0]
    assert tokenizer.decode(pair.chosen_ids.tolist()) == written.removesuffix("It is sunny.<|im_end|>")
    deaf = chat_tokenizer(chatml.tokenizer, CALLING.replace("m.tool_calls or []", "[]"))  # writes only the tools
    earlier = {**pairs, "prompt": [*asked, *turns("more")], "chosen": "a"}
    for bad, method in ((row, "sft"), (pairs, "dpo"), (earlier, "dpo")):
        with pytest.raises(DataError, match=r'1: the chat template leaves out the tool call "weather" \(turn 2\)'):
            run(write(bad), "auto", method=method, tokenizer=deaf)


def test_an_end_that_is_in_the_text_is_named(run, write):
    warnings = run(write({"prompt": "q", "completion": "a<|im_end|>\n"})).report.train.warnings
    assert warnings == {"special tokens in text": 1, DOUBLE_END: 1}
