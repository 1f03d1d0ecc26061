"""Reading rows: exact lines and reasons, the order of `datasets`, filters."""

import gzip
import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowlevel import hub
from lowlevel.config.data import Filter
from lowlevel.config.file import load_config
from lowlevel.data import sources
from lowlevel.data.mixing import apply_filters
from lowlevel.data.rows import Row, SourceRows, data_error, shuffled
from lowlevel.data.sources import read_source
from lowlevel.errors import ConfigError, DataError, LowlevelError
from lowlevel.hub import offline_without_network

GOOD = b'{"a": 1}\n'
CP1252 = "looks like CP1252: iconv -f CP1252 -t UTF-8 train.jsonl > utf8-train.jsonl"


def read_rows(source: str, split: str, method: str = "sft") -> list[Row]:
    """All rows of a source, or the error that `prepare` raises for those that cannot be read."""
    read = read_source(source, split, method)
    if read.problems:
        raise data_error(read.problems)
    return read.rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1, "b": "cut in the mid', "not valid JSON (cut at column 29?)"),
        (b'{"a": 1', "not valid JSON (cut at column 7?)"),
        (b'{"a": nope}\n', "not valid JSON (Expecting value at column 7)"),
        (b'{"a": "x\ty"}\n', "not valid JSON (Invalid control character at at column 9)"),
        (b'{"a": "\xff"}\n', f"not valid UTF-8 (byte 0xff at column 8); {CP1252}"),
        (b'{"a": 1, "a": 2}\n', 'not valid JSON (duplicate key "a")'),
        (b'{"a": {"b": 1, "b": 1}}\n', 'not valid JSON (duplicate key "b")'),
        (b'{"a": NaN}\n', "not valid JSON (NaN is not a JSON value)"),
        (b"[1, 2]\n", "is a list, expected an object with the columns of a row"),
        (b"7\n", "is a number, expected an object with the columns of a row"),
        (b'{"a": "\\ud800"}\n', "holds half a surrogate pair (\\ud800 to \\udfff), which is not text"),
        (b"[" * 100_000 + b"\n", "not valid JSON (nested too deeply)"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(write, line, message):
    with pytest.raises(DataError) as caught:
        read_rows(write(GOOD, b"\n", b"  \r\n", line), "train")
    assert str(caught.value) == f"train.jsonl:4: {message}"


def test_rows_keep_their_line_numbers_through_blank_lines_bom_and_crlf(write):
    read = read_source(write(b'\xef\xbb\xbf{"a": 1}\r\n', b"\n", b'{"a": "\\ud83d\\ude00"}'), "train")
    assert [(row.id, row.where, row.columns) for row in read.rows] == [
        (0, "train.jsonl:1", {"a": 1}),
        (1, "train.jsonl:3", {"a": "😀"}),
    ]
    assert read.warnings == {"byte order mark": 1}


def test_a_byte_order_mark_inside_the_file_is_an_error(write):
    with pytest.raises(DataError, match=r"^train.jsonl:2: not valid JSON"):
        read_rows(write(GOOD, b"\xef\xbb\xbf" + GOOD), "train")


def test_five_problems_are_shown_and_the_rest_counted(write):
    with pytest.raises(DataError) as caught:
        read_rows(write(GOOD, *[b"{?\n"] * 8), "train")
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines[:5]] == [f"train.jsonl:{n}" for n in range(2, 7)]
    assert lines[5:] == ["and 3 more; --on-bad-row skip continues without them"]


def test_gzip_is_read_and_a_cut_archive_is_an_error(write, tmp_path):
    rows = [{"a": f"{i} {i * 7919 % 1009}"} for i in range(5000)]
    path = write(*rows, name="train.jsonl.gz")
    assert [row.columns for row in read_rows(path, "train")] == rows
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in rows))[:-2000])
    with pytest.raises(DataError, match=r"cut.jsonl.gz:\d+: the compressed data is damaged or cut"):
        read_rows(str(cut), "train")
    cut.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="cut.jsonl.gz:1: the compressed data is damaged or cut"):
        read_rows(str(cut), "train")


def test_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x"}], "n": 1}, {"messages": None, "n": 2}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [(row.where, row.columns) for row in read_rows(str(path), "train")] == [
        ("rows.parquet:1", rows[0]),
        ("rows.parquet:2", rows[1]),
    ]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="rows.parquet: not a readable parquet file"):
        read_rows(str(path), "train")


def test_hub_rows_come_through_datasets_and_its_failures_are_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def load(name, split):
        if split != "test_sft":
            raise ValueError(f'Unknown split "{split}".\nA long story')
        return datasets.Dataset.from_list([{"a": 1}, {"a": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("owner/name", "test_sft")
    assert [(row.id, row.where, row.columns) for row in rows] == [
        (0, "owner/name[test_sft]:0", {"a": 1}),
        (1, "owner/name[test_sft]:1", {"a": 2}),
    ]
    with pytest.raises(ConfigError) as caught:
        read_rows("owner/name", "nope")
    said = 'Unknown split "nope".; nor is there a file or folder of this name'
    assert str(caught.value) == f'data source "owner/name", split "nope": {said}'


def test_a_hub_that_does_not_answer_is_asked_once_and_again_later(monkeypatch):
    """Until it answers, huggingface_hub is offline; a user's own offline mode stays."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    offline_without_network()
    assert not hub._unreached
    constants.HF_HUB_OFFLINE = False
    started = time.monotonic()
    with pytest.raises(ConfigError, match="Couldn't reach 'owner/none' on the Hub"):
        read_rows("owner/none", "train")
    assert constants.HF_HUB_OFFLINE and time.monotonic() - started < 5
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.handle_request).start()
        offline_without_network()
    assert not constants.HF_HUB_OFFLINE and not hub._unreached


@pytest.mark.parametrize(
    "source", ["./nowhere.jsonl", "nowhere.parquet", "./nowhere", "/nowhere/at/all", "a/b/c", "my rows", r"C:\rows"]
)
def test_a_missing_file_is_a_config_error(source):
    with pytest.raises(ConfigError, match="no such file"):
        read_rows(source, "train")


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_a_folder_that_is_named_like_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # a long path would be cut in the line
    Path(name).mkdir()
    with pytest.raises(ConfigError, match=f"{name}: is a folder; name a file in it"):
        read_rows(name, "train")


def test_a_folder_that_datasets_cannot_read_says_why_and_what_to_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"garbage{\n")
    with pytest.raises(ConfigError) as caught:
        read_rows(str(folder), "train")
    assert "JSON parse error" in str(caught.value) and "An error occurred" not in str(caught.value)
    assert str(caught.value).endswith("; this is a folder: name a file in it (.jsonl, .json, .jsonl.gz, .parquet)")


def test_a_folder_with_many_files_is_refused_before_all_are_listed(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"):
        (tmp_path / name).write_text('{"a": 1}')
    monkeypatch.setattr(sources, "MOST_FILES", 3)
    with pytest.raises(ConfigError, match="more than 3 files; name one with rows"):
        read_rows(str(tmp_path), "train")
    monkeypatch.setattr(sources, "MOST_FILES", 4)
    assert len(read_rows(str(tmp_path), "train")) == 4


@pytest.mark.parametrize("source", ["chats.csv", "data/chats.json", "chats.jsonl.zip"])
def test_a_missing_file_of_another_kind_is_not_asked_of_the_hub(source):
    with pytest.raises(ConfigError, match="no such file"):
        read_rows(source, "train")


@pytest.mark.parametrize("content", [(), (b"\n", b" \n")])
def test_no_rows(write, content):
    with pytest.raises(DataError, match=r"^train.jsonl has no rows$"):
        read_rows(write(*content), "train")


def test_demo_rows_by_method_and_split():
    assert len(read_rows("demo", "train")) == 2400
    assert "messages" in read_rows("demo", "train", "sft")[0].columns
    pairs = read_rows("demo", "heldout", "dpo")
    assert len(pairs) == 240
    assert {"prompt", "chosen", "rejected"} <= set(pairs[0].columns)
    with pytest.raises(ConfigError, match='"demo" has the splits train, heldout, not "test"'):
        read_rows("demo", "test")


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (7, 3), (3000, 42)])
def test_shuffle_is_that_of_datasets(n, seed):
    expected = datasets.Dataset.from_dict({"i": range(n)}).shuffle(seed=seed)["i"]
    rows = [Row(i, f"x:{i}", {}) for i in range(n)]
    assert [row.id for row in shuffled(rows, seed)] == list(expected)


ORCA = [
    {"status": "tie", "chosen_score": None, "gsm": False},
    {"status": "ok", "chosen_score": 8.0, "gsm": False},
    {"status": "ok", "chosen_score": 7.5, "gsm": False},
    {"status": None, "chosen_score": 9, "gsm": True},
]


def keep(rows, *conditions):
    filters = [Filter(column=c, op=op, value=v) for c, op, v in conditions]
    return apply_filters(
        SourceRows("f.jsonl", [Row(i, f"f.jsonl:{i + 1}", row) for i, row in enumerate(rows)]), filters
    )


def test_the_recipes_filter_and_the_count_of_what_each_condition_drops():
    kept = keep(ORCA, ("status", "!=", "tie"), ("chosen_score", ">=", 8), ("gsm", "==", False))
    assert [row.id for row in kept.rows] == [1]
    assert kept.dropped == {'status != "tie"': 1, "chosen_score >= 8": 1, "gsm == false": 1}
    assert kept.problems == []  # the tie without a score never reaches the second condition


@pytest.mark.parametrize(
    ("op", "value", "ids"),
    [
        ("==", 2, [1]),
        ("!=", 2, [0, 2]),
        (">", 2, [2]),
        (">=", 2, [1, 2]),
        ("<", 2, [0]),
        ("<=", 2.0, [0, 1]),
        ("in", [1, 3], [0, 2]),
        ("not in", [1, 3], [1]),
    ],
)
def test_every_operator(op, value, ids):
    assert [row.id for row in keep([{"n": 1}, {"n": 2}, {"n": 3}], ("n", op, value)).rows] == ids


@pytest.mark.parametrize(
    ("row", "condition", "message"),
    [
        ({"n": "8"}, ("n", ">=", 8), '"n" is text; n >= 8 compares it with a number'),
        ({"n": None}, ("n", ">=", 8), '"n" is null; n >= 8 compares it with a number'),
        ({"n": False}, ("n", "==", "False"), '"n" is true or false; n == "False" compares it with text'),
        ({"n": 1}, ("n", "in", ["a", "b"]), '"n" is a number; n in ["a", "b"] compares it with text'),
    ],
)
def test_incomparable_values_name_their_row(row, condition, message):
    error = data_error(keep([{"n": condition[2]}, row], condition).problems[-1:])
    assert str(error) == f"f.jsonl:2: {message}"


def test_a_filter_on_a_missing_column_names_those_found():
    with pytest.raises(ConfigError, match='f.jsonl has no column "score"; found: chosen_score, gsm, status'):
        keep(ORCA, ("score", ">=", 8))


@pytest.mark.parametrize("condition", [("n", "in", 1), ("n", ">=", [1])])
def test_lists_go_with_in_only(condition):
    with pytest.raises(ConfigError, match="takes"):
        keep([{"n": 1}], condition)


json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5)
lines = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(st.text(max_size=5), json_values, max_size=3).map(lambda row: json.dumps(row).encode()),
    st.sampled_from(
        [b'{"a": "\\ud83d"}', b'{"a": 1e999}', b"\xef\xbb\xbf{}", b'{"a":' + b"9" * 5000 + b"}", b"[" * 9999]
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines, max_size=6), st.booleans())
def test_any_bytes_are_rows_or_a_typed_error(tmp_path, content, final_newline):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(content) + b"\n" * final_newline)
    try:
        rows = read_rows(str(path), "train")
    except LowlevelError as error:
        str(error).encode("utf-8")
    else:
        assert all(isinstance(row.columns, dict) for row in rows)
        json.dumps([row.columns for row in rows], ensure_ascii=False).encode("utf-8")


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
