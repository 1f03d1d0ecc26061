"""Rows from the field that would be learned although nobody meant it, and pairs whose scores contradict them."""

import pytest

from lowlevel.errors import DataError


def row(completion="a", **columns):
    return {"prompt": "q", "completion": completion, **columns}


def chat(**keys):
    turns = [("user", "q"), ("assistant", "a"), ("user", "q")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1].update(keys)
    return {"messages": [*messages, {"role": "assistant", "content": "b"}]}


REFUSED = [
    (row(label="false"), '"label" is "false": an answer that is not to be learned'),
    (row(label="Bad"), 'label != "Bad"'),
    (row(label="0"), '"label" is "0"'),
    (row(label=-1), '"label" is -1'),
    (row(weight="0.0"), '"weight" is 0: the row is not to be learned'),
    (row("\u200b\ufeff \u200e"), "empty completion"),
    (row("<|im_end|>"), 'a reply is nothing but "<|im_end|>", the end of a reply'),
    (row(" <|im_end|><|im_end|>\n"), "a reply is nothing but"),
    (chat(content="\u200b"), "empty completion (turn 2)"),
    (chat(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]), '"train_detail" (turn 2) marks parts'),
    (chat(trainable="no"), '"trainable" (turn 2) is text, expected 1 or 0'),
]


@pytest.mark.parametrize(("bad", "message"), REFUSED)
def test_rows_that_are_not_to_be_learned_are_refused(run, write, bad, message):
    with pytest.raises(DataError) as caught:
        run(write(row("fine"), bad))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "good",
    [
        *(row(label=1), row(label="good"), row("False", label="false"), row("0", label="0"), row(weight="0.5")),
        *(row("a\u200bb"), row("x<|im_end|>"), chat(trainable=1), chat(train_detail=[])),
    ],
)
def test_rows_like_them_are_learned(run, write, good):
    assert len(run(write(good)).train) == 1


def test_an_integer_mark_makes_a_reply_context(run, write, chatml):
    (example,) = run(write(chat(trainable=0))).train
    assert chatml.decode(example.labels[example.labels >= 0].tolist()) == "b<|im_end|>"


@pytest.mark.parametrize(
    ("scores", "warned"),
    [
        ({"score_chosen": 1, "score_rejected": 9}, 'pairs with "score_chosen" less than "score_rejected"'),
        ({"chosen_score": "4", "rejected_score": "4.0"}, 'pairs with "chosen_score" equal to "rejected_score"'),
        ({"chosen-rating": 1.5, "rejected-rating": 2}, 'pairs with "chosen-rating" less than "rejected-rating"'),
        ({"score_chosen": 9, "score_rejected": 1}, ""),
        ({"score_chosen": None, "score_rejected": "high"}, ""),
    ],
)
def test_pairs_that_contradict_their_scores_are_counted(run, write, scores, warned):
    data = run(write({"prompt": "q", "chosen": "a", "rejected": "b", **scores}), "preference")
    found = [kind for kind in data.report.train.warnings if kind.startswith("pairs with")]
    assert (found[0].startswith(warned) and len(found) == 1) if warned else not found


def test_a_row_with_messages_and_a_completion_says_what_is_read(run, write):
    data = run(write({**chat(), "prompt": "q", "completion": "c"}))
    assert data.report.train.warnings == {'columns "prompt" and "completion" ignored ("messages" is read)': 1}
