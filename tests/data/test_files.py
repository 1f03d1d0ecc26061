"""Files as people have them: read if their content is rows, else one line with the cause and the mend."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lowlevel.data.rows import data_error
from lowlevel.data.sources import read_source
from lowlevel.errors import ConfigError, DataError

ROWS = [{"prompt": f"café {i}", "completion": "ok"} for i in range(4)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def pretty(value):
    return json.dumps(value, indent=1).encode()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


READ = {
    "plain.json": LINES.encode(),
    "unknown.dat": LINES.encode(),
    "lines.txt": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode("utf-8-sig"),
    "spaced.jsonl": LINES.replace("\n", "\n\n  \n").encode(),
    "array.json": pretty(ROWS),
    "array.jsonl": json.dumps(ROWS).encode("utf-8-sig"),
    "commas_first.json": ("[" + "\n,".join(map(json.dumps, ROWS)) + "]\n").encode(),
    "array.json.gz": gzip.compress(pretty(ROWS), mtime=0),
    "gzip.jsonl": gzip.compress(LINES.encode(), mtime=0),
    "unpacked.jsonl.gz": LINES.encode(),
    "parquet.jsonl": parquet(),
    "lines.parquet": LINES.encode(),
}


@pytest.mark.parametrize("name", READ)
def test_the_content_says_what_a_file_is(tmp_path, name):
    (tmp_path / name).write_bytes(READ[name])
    read = read_source(str(tmp_path / name), "train")
    assert [row.columns for row in read.rows] == ROWS and not read.problems
    if "array" in name:
        assert read.rows[1].where == f"{name}:row 2"


def test_one_pretty_object_is_one_row(write):
    row = {"messages": [{"role": "user", "content": "q"}], "tools": [{"type": "function"}]}
    (found,) = read_source(write(pretty(row), name="x.json"), "train").rows
    assert (found.where, found.columns) == ("x.json:row 1", row)


REPR = "".join(f"{row}\n" for row in ROWS)
PYTHON = (
    '1: has single quotes: Python\'s notation, not JSON (column 2), and 3 more lines; write json.dumps(row) + "\\n"'
)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
REFUSED = [
    ("x.jsonl", LINES.encode("utf-16"), ": is UTF-16 (as PowerShell's > writes); save it as UTF-8: iconv -f UTF-16 -t"),
    ("x.jsonl", LINES.encode("utf-16-le"), ": is UTF-16"),
    ("x.json", LINES.encode("utf-32"), ": is UTF-32"),
    ("x.jsonl.gz", gzip.compress(LINES.encode("utf-16"), mtime=0), ": is UTF-16"),
    ("x.jsonl", LINES.encode("cp1252"), ":1: not valid UTF-8 (byte 0xe9 at column 16), and 3 more lines; looks "),
    ("x.json", json.dumps(ROWS, ensure_ascii=False).encode("cp1252"), ": not valid UTF-8 (byte 0xe9 at column 17)"),
    ("x.jsonl", LINES.replace("café", "Привет").encode("cp1251"), "3 more lines; find its encoding and"),
    ("x.jsonl", LFS, ": is a Git LFS pointer, not the"),
    ("x.parquet", LFS, "fetch the data: git lfs pull"),
    ("x.jsonl", b"\n<!DOCTYPE html>\n<html>\n<head>\n", ": is a web page or XML, not data; download the raw file"),
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd$1234\n", ": is compressed with zstd; unpack it: zstd -d x.jsonl.zst"),
    ("x.jsonl", b"PK\x03\x04\n123", ": is a zip archive or a spreadsheet"),
    ("x.arrow", b"\xff\xff\xff\xff\x10\x02\0\0", ": is an Arrow file; write JSON lines: datasets.Dataset."),
    ("x.jsonl", b"\x80\x04K\x01.", ": is a pickle, which is never opened"),
    ("x.csv", b'prompt,completion\n"a",b\n', ": is CSV; write JSON lines: pandas.read_csv('x.csv').to_json('x.jsonl'"),
    ("x.jsonl", b"prompt\tcompletion\na\tb\n", ": is a table with tabs; write JSON lines: pandas.read_"),
    ("x.txt", b"Once upon a time\n", ": is plain text; write one JSON object a line"),
    ("x.jsonl", b"".join(pretty(row) + b"\n" for row in ROWS), ":1: an object goes over several lines; write"),
    ("x.json", pretty({"version": 1, "data": ROWS}), ': holds its rows in "data"; write them one a line: jq -c'),
    ("x.json", json.dumps({"train": ROWS}).encode(), ': holds its rows in "train"'),
    ("x.json", pretty(ROWS)[:-30], ": the JSON is cut here"),
    ("x.json", b'[\n{"a": 1},\n{"a": 2},\n]\n', ":4: has a comma before the closing bracket"),
    ("x.jsonl", LINES.replace("\n", "").encode(), ":1: holds several objects (column 41); write one object a line"),
    ("x.jsonl", LINES.replace("\n", "\r").encode(), ":1: holds several objects"),
    ("x.jsonl", LINES.replace("\n", ",\n").encode(), ":1: ends with a comma (column 41), and 3 more lines"),
    ("x.jsonl", LINES.replace("}", ", }").encode(), ":1: has a comma before the closing bracket (column 42), and 3"),
    ("x.jsonl", REPR.encode(), ":" + PYTHON),
    ("x.jsonl", b'{"prompt": "q", "completion": None}\n' * 3, ":1: is Python's notation, not JSON (column 31)"),
    ("x.jsonl", b'{prompt: "q"}\n' * 3, ":1: has keys without quotes (JSON5), not JSON (column 2), and 2 more lines"),
    ("x.jsonl", b"# rows\n// more\n" + LINES.encode(), ":1: holds a comment, which JSON has not (column 1), and 1"),
    ("x.jsonl", LINES.encode() + b"\0" * 99, ":5: holds NUL bytes, as after an interrupted copy (column 1); copy"),
    ("x.jsonl", b'[{"role": "user", "content": "q"}]\n' * 3, ":1: is a list, expected an object with the columns of"),
    ("x.jsonl", LINES.replace("}\n", "};\n").encode(), ":1: not valid JSON (Extra data at column 41), and 3"),
    ("x.jsonl", b"- prompt: a\n  completion: b\n", ": is plain text"),
    ("x.jsonl", (json.dumps(json.dumps(ROWS[0])) + "\n").encode() * 3, "and 2 more lines; it was encoded twice"),
    ("x.json", b"// rows\n" + pretty(ROWS), ":1: holds a comment"),
    ("x.json", json.dumps({"prompt": ["a"], "completion": ["b"]}).encode(), ": holds columns, not rows; write"),
    ("x.json", json.dumps({"prompt": {"0": "a"}, "completion": {"0": "b"}}).encode(), ": holds columns, not rows"),
    ("x.jsonl", b"", " has no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line"), REFUSED)
def test_one_cause_is_one_line_with_its_mend(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        raise data_error(read_source(str(tmp_path / name), "train").problems)
    assert str(caught.value).startswith(name) and line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "mend"),
    [
        ("hf://datasets/owner/name", 'use the hub name "owner/name"'),
        ("https://huggingface.co/datasets/owner/name", 'use the hub name "owner/name"'),
        ("https://example.org/rows.jsonl", "download the file and name it here"),
        ("s3://bucket/rows.parquet", "download the file and name it here"),
    ],
)
def test_an_address_is_not_a_source(source, mend):
    with pytest.raises(ConfigError) as caught:
        read_source(source, "train")
    assert str(caught.value) == f"data source {source} is a web address: {mend}"


def test_a_folder_of_save_to_disk(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "split")
    for name in ("one", "split"):
        assert [row.columns for row in read_source(str(tmp_path / name), "train").rows] == ROWS


def test_a_folder_whose_files_datasets_would_leave_out_is_refused(tmp_path):
    """It takes files with "train" in their names as the split, and says nothing of the others."""
    line = json.dumps({"prompt": "q", "completion": "a"}) + "\n"
    for name in ("a.jsonl", "more/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line)
    assert len(read_source(str(tmp_path), "train").rows) == 2
    (tmp_path / "train-c.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=r"2 of its files belong to no split \(a.jsonl and 1 more\); name one file"):
        read_source(str(tmp_path), "train")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- {config_name: default, data_files: more/*}\n---\n")
    assert len(read_source(str(tmp_path), "train").rows) == 1
