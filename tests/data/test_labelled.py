"""Rows with a label, and pairs as two of them."""

import json

import numpy as np
import pytest

from lowlevel.config.file import config_from_tables
from lowlevel.config.given import GivenRows
from lowlevel.config.offline import KTOConfig
from lowlevel.errors import DataError
from lowlevel.methods.kto import balance
from lowlevel.running.assembly import prepare_data

PAIR = {"prompt": "What is two plus two?", "chosen": "It is four.", "rejected": "Five, I think."}
HALVES = [
    {"prompt": PAIR["prompt"], "completion": PAIR["chosen"], "label": True},
    {"prompt": PAIR["prompt"], "completion": PAIR["rejected"], "label": False},
]
ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


def prepared(*rows, **data):
    """The data of a kto run on rows given in Python."""
    config = config_from_tables({"method": "kto", "data": data}, "test")
    source = config.data.model_copy(update={"source": GivenRows.of(list(rows))})
    return prepare_data(config.model_copy(update={"data": source}))


@pytest.mark.parametrize(
    ("label", "value"),
    [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (1.0, 1.0), (np.bool_(False), 0.0), (np.int64(1), 1.0)],
)
def test_labels(label, value):
    _, data = prepared({**HALVES[0], "label": label})
    assert data.train[0].values == (value,)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("true", 'is "true", expected true (desirable) or false; convert it'),
        ("👍", 'is "👍", expected true'),
        (-1, "is -1, expected"),
        (0.5, "is 0.5, expected"),
        (2, "is 2, expected"),
        ([True], "is [true], expected"),
        (None, "is missing, expected"),
    ],
)
def test_other_labels_are_refused_with_their_row(label, words):
    with pytest.raises(DataError) as error:
        prepared(HALVES[0], {**HALVES[1], "label": label})
    assert str(error.value).startswith('data:2: "label" ') and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows",
    [
        [PAIR],
        [{**PAIR, "chosen": [{"role": "assistant", "content": PAIR["chosen"]}]}],
        [{"system": "", "input": PAIR["prompt"], "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}],
        [{"messages": [{"role": "user", "content": h["prompt"]}, {"role": "assistant", "content": h["completion"]}],
          "label": h["label"]} for h in HALVES],
        [{"question": h["prompt"], "answer": h["completion"], "label": int(h["label"])} for h in HALVES],
    ],
    ids=["pair", "pair of messages", "orca", "messages", "question and answer"],
)  # fmt: skip
def test_every_form_of_the_rows_is_the_same_data(rows):
    """The tokens, the labels and the fingerprint are those of two plain rows."""
    plain, data = prepared(*HALVES)[1], prepared(*rows)[1]
    assert data.report.train.fingerprint == plain.report.train.fingerprint
    assert [x.values for x in data.train] == [(1.0,), (0.0,)] and [x.row for x in data.train] == [0, 1]
    for one, other in zip(data.train, plain.train, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist() and one.labels.tolist() == other.labels.tolist()


@pytest.mark.parametrize("completion", ["Because.", [{"role": "assistant", "content": "Because."}]])
def test_only_the_last_reply_is_scored(completion):
    tokenizer, data = prepared({"prompt": ASKED, "completion": completion, "label": True})
    (example,) = data.train
    assert tokenizer.decode(example.input_ids[example.labels >= 0].tolist()) == "Because.</s>"
    whole = {"messages": [*ASKED, {"role": "assistant", "content": "Because."}], "label": True}
    assert prepared(whole)[1].train[0].labels.tolist() == example.labels.tolist()


def test_a_pair_that_cannot_be_read_is_told_once():
    with pytest.raises(DataError) as error:
        prepared(PAIR, {**PAIR, "rejected": PAIR["chosen"]})
    assert str(error.value) == "data:2 chosen: chosen and rejected are the same text"


@pytest.mark.parametrize(
    ("rows", "method", "words"),
    [
        ({"prompt": "a", "completion": "b"}, "kto", "missing: label, true for desirable"),
        (HALVES[0], "dpo", "they fit KTO (prompt, completion, label)"),
    ],
)
def test_columns_of_another_method(rows, method, words):
    config = config_from_tables({"method": method}, "test")
    source = config.data.model_copy(update={"source": GivenRows.of([rows])})
    with pytest.raises(DataError, match="no format of") as error:
        prepare_data(config.model_copy(update={"data": source}))
    assert words in str(error.value)


def test_filters_and_repeated_rows():
    rows = [{**PAIR, "score": 3}, {**PAIR, "prompt": "And three?", "score": 1}, {**HALVES[0], "score": 2}]
    _, data = prepared(*rows[:2], filters=[{"column": "score", "op": ">", "value": 2}])
    assert [x.values for x in data.train] == [(1.0,), (0.0,)]
    warnings = prepared(HALVES[0], {**HALVES[0], "label": False}, HALVES[1])[1].report.train.warnings
    assert warnings == {"contradicting labels": 1}


@pytest.mark.parametrize(
    ("desirable", "undesirable", "settings", "advice"),
    [
        (40, 40, {}, ""),
        (40, 30, {}, ""),
        (30, 40, {}, "kto.desirable_weight = 1.33 to 1.78"),
        (400, 100, {}, "kto.undesirable_weight = 3 to 4"),
        (400, 100, {"undesirable_weight": 3.0}, ""),
        (10, 0, {}, ""),
    ],
)
def test_unbalanced_labels_get_the_paper_s_range(desirable, undesirable, settings, advice):
    """desirable_weight n_desirable / (undesirable_weight n_undesirable) in [1, 4/3]."""
    _, data = prepared(*HALVES)
    line = balance(data.train[:1] * desirable + data.train[1:] * undesirable, KTOConfig(**settings))
    assert line.startswith(f"{desirable} desirable and {undesirable} undesirable completions")
    assert (advice in line) if advice else ("set" not in line), json.dumps(line)
