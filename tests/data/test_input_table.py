"""The input table: each kind of bad input gives one line with its row, as a typed error, without a model."""

import pytest

from lowlevel.data.rendering import TOOLS_LEFT_OUT
from lowlevel.data.report import not_learned
from lowlevel.data.tokenizer import chat_tokenizer
from lowlevel.errors import ConfigError, DataError


def chat(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def messages(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def pair(prompt="q", chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


ORCA = {"system": "", "input": "q", "chosen": "a", "rejected": "b"}
GOOD, GOOD_TEXT, GOOD_PAIR = chat("q", "a"), {"prompt": "q", "completion": "a"}, pair()
IGNORED_SYSTEM = 'column "system" ignored (make it the first message)'
NO_SFT, NO_DPO = (f"train.jsonl: no format of {name} rows fits the columns; found: " for name in ("SFT", "DPO"))
RENAME = "; rename them (lowlevel/data/README.md, Row formats)"
KNOWN = "known: system, user, assistant, tool"

SFT = [
    ({"prompt": "q", "completion": None}, '"completion" is null, expected text'),
    ({"prompt": 7, "completion": "a"}, '"prompt" is a number, expected text'),
    ({"prompt": "q"}, 'missing "completion"'),
    ({"prompt": "q", "completion": ""}, "empty completion"),
    ({"prompt": "q", "completion": " \n"}, "empty completion"),
    ({"messages": None}, '"messages" is null, expected a list of messages'),
    ({"messages": "hi"}, '"messages" is text, expected a list of messages'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": ["hi"]}, '"messages" (turn 1) is text, expected an object with role and content'),
    (messages(("user", None), ("assistant", "a")), '"content" (turn 1) is null, expected text'),
    ({"messages": [{"role": "user"}]}, 'missing "content" (turn 1)'),
    ({"messages": [{"content": "x"}]}, 'missing "role" (turn 1)'),
    (messages(("usr", "q"), ("assistant", "a")), f'role "usr" (turn 1); {KNOWN}'),
    (messages(("user", "q"), ("assistant", [])), '"content" (turn 2) is a list, expected text'),
    (chat("q", ""), "empty completion (turn 2)"),
    (chat("q", " ", "more", "a"), "empty completion (turn 2)"),
    (messages(("user", "q")), "nothing to learn from (no assistant turn)"),
    (chat("q", "a", "more"), 'last turn is "user", expected "assistant"'),
    (messages(("assistant", "a")), "first turn is an assistant reply without a prompt"),
]
DPO = [
    (pair(chosen=None), '"chosen" is null, expected text'),
    (pair(prompt=1), '"prompt" is a number, expected text'),
    (pair(rejected=""), "empty rejected"),
    (pair(chosen="", rejected=""), "empty chosen"),
    (pair(rejected=[]), "empty rejected"),
    (pair(rejected=[{"role": "assistant", "content": ""}]), "empty rejected (turn 1)"),
    (pair(chosen="same", rejected="same"), "chosen and rejected are the same text"),
    ({"prompt": "q", "chosen": "a"}, 'missing "rejected"'),
    (pair(prompt=[]), '"prompt" is empty'),
    (pair(prompt=messages(("user", "q"), ("assistant", "a"))["messages"]), 'the last turn of "prompt" is "assistant"'),
    (pair(chosen=[{"role": "user", "content": "x"}]), '"chosen" is not one assistant message after the prompt'),
]


def failure(call, *args, **keys) -> str:
    with pytest.raises(DataError) as caught:
        call(*args, **keys)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(("bad", "message"), SFT)
def test_sft_rows(run, write, bad, message):
    path = write(*[GOOD if "messages" in bad else GOOD_TEXT] * 6, bad)
    assert failure(run, path) == f"train.jsonl:7: {message}"
    skipping = run(path, on_bad_row="skip")
    assert len(skipping.train) == 6
    assert [d.first for d in skipping.report.train.dropped.values()] == [(f"train.jsonl:7: {message}",)]
    assert not_learned(skipping.report)[0] == f"skipped: 1 train, the first train.jsonl:7: {message}"


@pytest.mark.parametrize(("bad", "message"), DPO)
def test_preference_rows(run, write, bad, message):
    path = write(*[GOOD_PAIR] * 6, bad)
    assert failure(run, path, "preference").startswith(f"train.jsonl:7: {message}")
    assert len(run(path, "preference", on_bad_row="skip").train) == 6


@pytest.mark.parametrize(("column", "value"), [("system", None), ("input", 3), ("chosen", ""), ("rejected", "a")])
def test_orca_rows(run, write, column, value):
    message = failure(run, write(ORCA, {**ORCA, column: value}), "orca")
    assert message.startswith("train.jsonl:2: ")
    assert column in message


@pytest.mark.parametrize(
    ("row", "data_format", "message"),
    [
        (
            {"foo": 1},
            "messages",
            NO_SFT + "foo; nearest: messages or prompt+completion; rename yours (lowlevel/data/README.md, Row formats)",
        ),
        (
            {"prompt": "q"},
            "messages",
            NO_SFT + "prompt; nearest: prompt, completion (missing: completion); rename them "
            "(lowlevel/data/README.md, Row formats)",
        ),
        (
            {"prompt": "q", "chosen": "a"},
            "preference",
            NO_DPO + "chosen, prompt; nearest: prompt, chosen, rejected (missing: rejected); rename them "
            "(lowlevel/data/README.md, Row formats)",
        ),
        (
            GOOD_PAIR,
            "orca",
            NO_DPO + 'chosen, prompt, rejected; missing: system, input; they fit data.format = "preference"',
        ),
        (
            {"system": "s", "input": "q", "chosen": "a", "rejected": "b"},
            "preference",
            NO_DPO + 'chosen, input, rejected, system; missing: prompt; they fit data.format = "orca"',
        ),
    ],
)
def test_missing_columns_are_one_error_for_the_file(run, write, row, data_format, message):
    assert failure(run, write(row, row), data_format) == message


def test_bad_lines_and_bad_content_are_counted_together(run, write):
    path = write(*[b"{cut\n"] * 3, GOOD, *[chat("q", "")] * 4)
    lines = failure(run, path).splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == [f"train.jsonl:{n}" for n in (1, 2, 3, 5, 6)]
    assert lines[-1] == "and 2 more; --on-bad-row skip continues without them"
    report = run(path, on_bad_row="skip").report.train
    assert (report.rows_read, report.rows_kept) == (8, 1)
    assert {reason: dropped.count for reason, dropped in report.dropped.items()} == {
        "not valid JSON": 3,
        "empty completion": 4,
    }


def test_a_holdout_hides_no_problem(run, write):
    path = write(GOOD, b"{cut\n", chat("q", ""), GOOD)
    holdout = {"eval_source": "holdout", "eval_limit": 1}
    assert failure(run, path, **holdout).splitlines() == [
        "train.jsonl:2: not valid JSON (Expecting property name enclosed in double quotes at column 2)",
        "train.jsonl:3: empty completion (turn 2)",
    ]
    assert failure(run, write(GOOD, b"{cut\n"), **holdout).startswith("train.jsonl:2: not valid JSON")


def test_the_same_tokens_from_different_text(run, write, kit, chatml):
    trimming = chat_tokenizer(chatml.tokenizer, kit.CHATML.replace("m['content']", "m['content'] | trim"))
    path = write(GOOD_PAIR, pair(chosen="same", rejected="same "))
    assert failure(run, path, "preference", tokenizer=trimming) == (
        "train.jsonl:2: chosen and rejected have the same tokens (5)"
    )


def test_truncation_to_the_same_tokens(run, write):
    path = write(GOOD_PAIR, pair(chosen="x" * 90 + "1", rejected="x" * 90 + "2"))
    assert failure(run, path, "preference", max_length=64) == (
        "train.jsonl:2: chosen and rejected are the same after truncation to max_length 64 (44 tokens left)"
    )
    assert len(run(path, "preference", max_length=512).train) == 2


def test_a_prompt_that_fills_max_length_is_dropped_and_shown(run, write):
    long = chat("x" * 600, "a")
    data = run(write(GOOD, GOOD, GOOD, long), max_length=64)
    assert len(data.train) == 3
    (dropped,) = data.report.train.dropped.values()
    # <|im_start|>user\n + 600 + <|im_end|>\n + <|im_start|>assistant\n
    assert dropped.first == ("train.jsonl:4: prompt has 619 tokens, max_length 64 leaves no completion token",)


def test_all_rows_too_long(run, write):
    message = failure(run, write(*[chat("x" * 600, "a")] * 4), max_length=64)
    assert message == "train.jsonl: no usable rows: 4 of 4 longer than max_length 64"


def test_all_rows_skipped_names_the_reasons(run, write):
    path = write(chat("q", ""), chat("q", ""), {"messages": []})
    message = failure(run, path, on_bad_row="skip")
    assert message == "train.jsonl: no usable rows: 2 empty completion, 1 empty messages"


def test_filters_that_drop_every_row(run, write):
    path = write({**ORCA, "chosen_score": 3}, {**ORCA, "chosen_score": 1})
    keys = {"filters": ({"column": "chosen_score", "op": ">=", "value": 8},)}
    assert failure(run, path, "orca", **keys) == (
        "train.jsonl: no usable rows: 2 of 2 filtered out (chosen_score >= 8 drops 2)"
    )


def test_no_rows(run, write):
    assert failure(run, write()) == "train.jsonl has no rows"


def test_template_that_insists_on_alternating_turns(run, write, kit, chatml):
    strict = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + kit.CHATML
    )
    path = write(GOOD, messages(("user", "q"), ("user", "again"), ("assistant", "a")))
    message = failure(run, path, tokenizer=chat_tokenizer(chatml.tokenizer, strict))
    assert message == "train.jsonl:2: the chat template refuses the row: roles must alternate"
    assert run(path).report.train.warnings == {"turns not alternating": 1}


def test_prompt_that_is_no_prefix(run, write, kit, chatml):
    template = kit.CHATML.replace("assistant\n", "assistant\n<think>")
    message = failure(run, write(GOOD), tokenizer=chat_tokenizer(chatml.tokenizer, template))
    assert message == (
        "train.jsonl:1: prompt tokens are not a prefix of prompt+answer tokens (turn 2): prompt "
        '"<think>", prompt+answer "a<|im_end|>\\n"; data.chat_template_from can name another template'
    )


def test_a_template_whose_markers_never_close_around_a_reply(run, write, kit, chatml):
    marked = kit.CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    message = failure(run, write(GOOD), tokenizer=chat_tokenizer(chatml.tokenizer, marked))
    assert message == "train.jsonl:1: nothing to learn from (the chat template marks no reply)"


def test_tokenizer_larger_than_the_embedding(run, write):
    path = write(GOOD, chat("q", "z z"))
    largest = int(max(run(path).train[1].input_ids))
    assert len(run(path, vocab=largest + 1).train) == 2
    message = failure(run, path, vocab=largest, on_bad_row="skip")
    assert message.startswith(f"train.jsonl:2: token id {largest} >= vocabulary {largest} (row 1)")


def test_max_length_beyond_the_model(run, write):
    with pytest.raises(ConfigError, match="max_length 400 > model limit 256"):
        run(write(GOOD), max_length=400, positions=256)


@pytest.mark.parametrize(
    ("rows", "data_format", "warning"),
    [
        ([GOOD, GOOD, chat("other", "b")], "messages", {"duplicate rows": 1}),
        (
            [pair("q", "1", "2"), pair("q", "2", "1"), pair("other", "1", "2"), pair("another", "2", "1")],
            "preference",
            {"contradicting pairs": 1},
        ),
        ([chat("<|im_end|> hm", "a"), GOOD], "messages", {"special tokens in text": 1}),
        ([chat(" ", "a")], "messages", {"empty user turn": 1}),
        ([chat("q", "\na")], "messages", {"prompt and reply tokenised apart": 1}),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "a", "refusal": "x"},
                    ]
                }
            ],
            "messages",
            {'message key "refusal" ignored': 1},
        ),
        (
            [pair(chosen=[{"role": "assistant", "content": "a", "refusal": "x"}]), pair("other")],
            "preference",
            {'message key "refusal" ignored': 1},
        ),
        (
            [{**GOOD, "tools": []}, {**chat("other", "b"), "tools": [{"name": "f"}], "weight": 0.5}],
            "messages",
            {TOOLS_LEFT_OUT: 1, 'column "weight" ignored (data.weight_column = "weight" reads it)': 1},
        ),
        (
            [{**GOOD, "system": None, "weight": 1, "documents": {"x": None}}, {**chat("other", "b"), "system": " "}],
            "messages",
            {},
        ),
        ([{**GOOD_TEXT, "system": "S"}], "messages", {IGNORED_SYSTEM: 1}),
        ([{**GOOD, "system": "S"}], "messages", {IGNORED_SYSTEM: 1}),
        (
            [{**GOOD_PAIR, "system": "S"}, pair("other"), {**pair("third"), "system": ""}],
            "preference",
            {IGNORED_SYSTEM: 1},
        ),
        ([{**ORCA, "system": "S"}], "orca", {}),
    ],
)
def test_oddities_are_warnings_with_a_count(run, write, rows, data_format, warning):
    data = run(write(*rows), data_format)
    assert data.report.train.warnings == warning
    assert len(data.train) == len(rows)


def test_a_prompt_may_stand_in_the_conversations_alone(run, write):
    """TRL's implicit prompt, and UltraFeedback's binarised pairs, whose prompt is also there as text."""
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    good, bad = ([*asked, {"role": "assistant", "content": text}] for text in ("good", "bad"))
    explicit = run(write(pair(prompt=asked)), "preference").train[0]
    for row in ({"chosen": good, "rejected": bad}, pair("q", good, bad), pair(asked, good, bad)):
        found = run(write(row), "preference").train[0]
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert getattr(found, name).tolist() == getattr(explicit, name).tolist()
    other = [{"role": "user", "content": "another"}, bad[-1]]
    assert "differ before their last turn (turn 1)" in failure(
        run, write({"chosen": good, "rejected": other}), "preference"
    )
    assert failure(run, write(pair("another", good, bad)), "preference") == (
        'train.jsonl:1: "prompt" differs from the question in "chosen" (turn 2) from character 1: "another" and "q"; '
        'remove "prompt" or correct it'
    )
    spaced = run(write(pair("\nq ", good, bad)), "preference").train[0]  # the conversation's text counts
    assert spaced.prompt_ids.tolist() == explicit.prompt_ids.tolist()
