"""Rows given in Python: the same checks, fingerprints and report as rows of a file."""

import dataclasses
import enum
import json
import re

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch

from lowlevel.config.data import DataConfig
from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.given import GIVEN, GivenRows
from lowlevel.config.schema import RunConfig
from lowlevel.data.sources import read_source
from lowlevel.errors import ConfigError, DataError

PAIRS = [{"prompt": f"q{i % 5}", "chosen": f"yes {i}", "rejected": f"no {i}", "score": i} for i in range(12)]


class MapStyle(torch.utils.data.Dataset):
    """Has no __iter__, and raises no IndexError at its end."""

    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, index):
        return PAIRS[index % len(PAIRS)]


class IterableStyle(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from PAIRS


class Color(enum.StrEnum):
    RED = "red"


def read(rows):
    return read_source(GivenRows.of(rows), "train")


KINDS = {
    "list": lambda: PAIRS,
    "generator": lambda: (row for row in PAIRS),
    "datasets": lambda: datasets.Dataset.from_list(PAIRS),
    "map-style": MapStyle,
    "iterable": IterableStyle,
    "subset": lambda: torch.utils.data.Subset(MapStyle(), range(len(PAIRS))),
    "given": lambda: GivenRows.of(PAIRS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_rows_of_a_file(run, write, kind):
    keys = {
        "shuffle_seed": 3,
        "eval_source": "holdout",
        "eval_limit": 3,
        "filters": ({"column": "score", "op": ">", "value": 1},),
    }
    expected = run(write(*PAIRS), "preference", **keys)
    found = run(GivenRows.of(KINDS[kind]()), "preference", **keys)
    assert found.report.train.fingerprint == expected.report.train.fingerprint
    assert found.report.evaluation.fingerprint == expected.report.evaluation.fingerprint
    assert found.train[0].where == f"data:{found.train[0].row + 1}"
    assert [e.row for e in found.train] == [e.row for e in expected.train]
    ours, theirs = found.report.to_json(), expected.report.to_json()
    assert (ours["train"].pop("source"), theirs["train"].pop("source")) == (GIVEN, "train.jsonl")
    assert ours["evaluation"].pop("source") == f"{GIVEN} (holdout)"
    del theirs["evaluation"]["source"]
    assert ours == theirs


def test_numpy_values_tuples_and_enums_become_json():
    row = {
        "a": np.float32(0.5),
        "b": np.arange(3),
        "c": (np.int64(1), {"d": np.bool_(True)}),
        "e": Color.RED,
        "f": None,
    }
    (found,) = read([row]).rows
    assert found.columns == {"a": 0.5, "b": [0, 1, 2], "c": [1, {"d": True}], "e": "red", "f": None}
    assert json.loads(json.dumps(found.columns)) == found.columns
    assert type(found.columns["e"]) is str


@pytest.mark.parametrize(
    ("value", "named"), [(b"x", "bytes"), (torch.ones(2), "Tensor"), ({1: 2}, "dict with keys"), ([{2, 3}], "set")]
)
def test_other_values_are_problems_of_their_row(run, value, named):
    rows = [PAIRS[0], {**PAIRS[1], "extra": value}, PAIRS[2]]
    with pytest.raises(DataError, match=rf'^data:2: column "extra" is a {named}'):
        run(GivenRows.of(rows), "preference")
    assert [e.row for e in run(GivenRows.of(rows), "preference", on_bad_row="skip").train] == [0, 2]


def test_the_message_about_a_value_and_half_a_surrogate_pair():
    problems = read([{"a": b"x"}, {"a": "\ud800"}]).problems
    assert [(p.where, p.message) for p in problems] == [
        ("data:1", 'column "a" is a bytes, expected text, number, list or object'),
        ("data:2", "holds half a surrogate pair (\\ud800 to \\udfff), which is not text"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "data: got int, expected a list of dicts"),
        ("rows.jsonl", "data: got str"),
        ({"prompt": ["q"]}, "data: got dict"),
        ([], "data: the list has no rows"),
        ([{"a": 1}, "text"], "data: row 2 is a str, expected a dict"),
        ([{"a": 1}, {1: "a"}], r"data: row 2 has the key 1 \(int\), expected text keys"),
    ],
)
def test_data_without_rows_is_refused(data, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        GivenRows.of(data)


def test_bad_rows_are_named(run):
    with pytest.raises(DataError, match="^data:2: empty chosen$"):
        run(GivenRows.of([PAIRS[0], {**PAIRS[1], "chosen": ""}]), "preference")


def test_evaluation_rows_may_be_given_too(run):
    data = run(GivenRows.of(PAIRS), "preference", eval_source=GivenRows.of(PAIRS[:2]))
    assert (len(data.train), len(data.evaluation), data.report.overlap) == (12, 2, 2)
    assert data.report.evaluation.source == GIVEN
    same = GivenRows.of(PAIRS)
    with pytest.raises(ConfigError, match=f"data.eval_source {GIVEN} is also the training source"):
        run(same, "preference", eval_source=same)


def test_the_saved_configuration_names_the_rows_and_cannot_read_them(run):
    rows = GivenRows.of([{"secret": "hf_" + "a" * 34}])
    tables = {"data": {"source": rows, "eval_source": rows, "eval_limit": 1}}
    config = config_from_tables(tables, "flags")
    assert config.data.source is rows and config.data.eval_source is rows
    assert RunConfig(data=DataConfig(source=rows)).data.source is rows
    saved = to_tables(config)
    assert (saved["data"]["source"], saved["data"]["eval_source"]) == (GIVEN, GIVEN)
    assert to_tables(config_from_tables(saved, "config.toml")) == saved
    with pytest.raises(ConfigError) as caught:
        run(GIVEN, eval_source=GIVEN)
    text = "the rows of this run were given in Python: open it with lowlevel.Run(DIR, data=rows)"
    assert str(caught.value) == text


def test_neither_text_nor_rows_is_a_config_error():
    with pytest.raises(ConfigError, match=r"^x: data.source: expected a string, got 3\nx: data.eval_source: expected"):
        config_from_tables({"data": {"source": 3, "eval_source": []}}, "x")


@dataclasses.dataclass
class AsObject:
    prompt: str


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (pandas.DataFrame(PAIRS), 'got a DataFrame of pandas, expected its rows: data.to_dict("records")'),
        (pyarrow.Table.from_pylist(PAIRS), "got a Table of pyarrow, expected its rows: data.to_pylist()"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}), 'its rows: data["train"]'),
        ([AsObject("q")], "row 1 is a AsObject, expected a dict with the columns of a row (pydantic: row.model_dump()"),
    ],
)
def test_tables_and_objects_are_refused_with_what_gives_their_rows(data, hint):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        GivenRows.of(data)
