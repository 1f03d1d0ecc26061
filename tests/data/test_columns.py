"""data.columns: numbers of a row that a custom loss receives."""

import pytest

from lowlevel.config.file import load_config
from lowlevel.errors import ConfigError, DataError

CHAT = {"prompt": "q", "completion": "a"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
FORMATS = {"messages": CHAT, "preference": PAIR, "orca": {"system": "", "input": "q", "chosen": "a", "rejected": "b"}}


@pytest.mark.parametrize("data_format", FORMATS)
def test_examples_carry_the_numbers_in_the_order_of_the_key(run, write, data_format):
    rows = [{**FORMATS[data_format], "weight": 0.5, "label": True}, {**FORMATS[data_format], "weight": -2, "label": 0}]
    data = run(write(*rows), data_format, columns=("label", "weight"), eval_source=write(rows[1], name="e.jsonl"))
    assert [e.values for e in data.train] == [(1.0, 0.5), (0.0, -2.0)]
    assert [e.values for e in data.evaluation] == [(0.0, -2.0)]
    assert all(type(value) is float for e in data.train for value in e.values)
    assert data.report.train.warnings == {}  # neither an ignored column nor a duplicate row
    plain = run(write(*({**row, "label": True} for row in rows)), data_format)
    assert [e.values for e in plain.train] == [(), ()]
    hint = ' (data.weight_column = "weight" reads it)' * (data_format == "messages")
    assert plain.report.train.warnings == {f'column "weight" ignored{hint}': 2, "duplicate rows": 1}


def test_the_fingerprint_includes_the_numbers_only_if_they_are_read(run, write):
    one, other = write({**PAIR, "w": 1}, name="1.jsonl"), write({**PAIR, "w": 2}, name="2.jsonl")

    def fingerprint(path, **keys):
        return run(path, "preference", **keys).report.train.fingerprint

    # of a run before data.columns was added
    assert fingerprint(one) == "faab225631ec2d8a7523aa1efd775015b57c61e18f60ed4d19dcaf926d0726ba"
    assert fingerprint(one) == fingerprint(other) != fingerprint(one, columns=("w",))
    assert fingerprint(one, columns=("w",)) != fingerprint(other, columns=("w",))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b'"7"', '"w" is text, expected a number'),
        (b"null", '"w" is null, expected a number'),
        (b"1e999", '"w" is inf, expected a finite number'),
        (b"9" * 400, '"w" is inf, expected a finite number'),
        (b"[1]", '"w" is a list, expected a number'),
        (None, 'missing "w"'),
    ],
)
def test_anything_but_a_finite_number_is_a_problem_of_its_row(run, write, value, message):
    bad = b'{"prompt": "r", "completion": "a"' + (b', "w": ' + value if value else b"") + b"}\n"
    path = write({**CHAT, "w": 1}, bad)
    with pytest.raises(DataError) as caught:
        run(path, columns=("w",))
    assert str(caught.value) == f"train.jsonl:2: {message}"
    assert [e.row for e in run(path, columns=("w",), on_bad_row="skip").train] == [0]
    assert len(run(path).train) == 2


def test_a_column_that_no_row_has_is_one_error(run, write):
    with pytest.raises(ConfigError, match='data.columns: train.jsonl has no column "w"; found: completion, prompt'):
        run(write(CHAT, CHAT), columns=("w",))


def test_columns_on_the_command_line():
    assert load_config(None, {"data.columns": "weight,label"}).data.columns == ("weight", "label")
