"""Run files and data sets of any kind give a result or one typed error: never a traceback, never half of an output.

FUZZ_EXAMPLES=1000 python -m pytest tests/faults/test_fuzz.py     the long form; runs/test.sh takes 20, CI 300
"""

import gzip
import io
import json
import os
import tomllib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from workspace import CHATS, PAIRS, make_workspace, run

from lowlevel.config.file import load_config
from lowlevel.config.schema import SECTIONS
from lowlevel.errors import ConfigError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
CONFIGS = 5 * EXAMPLES  # without a data set: some 25 ms each
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

PIECES = [b"\0", b"\xef\xbb\xbf", b"\n", b'"', b"\\", b"[" * 3000, b"9" * 5000]
KEYS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]
texts = st.text(max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "demo",
        "nan",
        "-1",
        "1e999",
        "\0",
        "\ud83d\ude00",
        "a/b/c",
        "../..",
        "~",
        "/",
        "%s{}",
        "\u001b[2J",
        "x" * 300,
    ]
)
numbers = st.integers() | st.sampled_from([0, -1, 1, 2**31, 2**63 - 1, 2**64, 10**400]) | st.floats()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def toml_able(value):
    """The value without what TOML cannot say (null, integers of more than 64 bits, halves of surrogate pairs)."""
    if isinstance(value, dict):
        return {key: toml_able(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [toml_able(item) for item in value if item is not None]
    if value is None:
        return ""
    return value


def damaged(draw, data: bytes) -> bytes:
    """Bytes flipped, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "drop", "double", "insert"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 20))]
            case "double":
                data[at:at] = data[at : at + 40]
            case _:
                data[at:at] = draw(st.binary(max_size=4) | st.sampled_from(PIECES))
    return bytes(data)


@st.composite
def run_files(draw, space, source: str, kind: str) -> bytes:
    """A valid run file over a data set, with keys, values and bytes of it changed."""
    method = "sft" if kind == "messages" else "dpo"
    tables = tomllib.loads(space.write("fuzz", method, data={"source": source, "format": kind}).read_text())
    for _ in range(draw(st.integers(0, 3))):
        section, key = draw(st.sampled_from(KEYS))
        if draw(st.integers(0, 9)) == 0:
            key = draw(texts)
        if key in ("source", "eval_source", "name", "chat_template_from", "adapter", "init_from"):
            continue  # names that no file has are asked of the hub, which costs seconds a name
        tables.setdefault(section, {})[key] = toml_able(draw(values))
    if draw(st.integers(0, 9)) == 0:
        tables[draw(texts)] = toml_able(draw(values))
    return tomli_w.dumps(tables).encode("utf-8", "surrogatepass")


@st.composite
def changed_row(draw, row: dict) -> object:
    """A row with one of its values, at any depth, in another type or gone."""
    row = json.loads(json.dumps(row))
    place = row
    while True:
        key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        break
    match draw(st.sampled_from(["value", "value", "drop", "rename", "long"])):
        case "value":
            place[key] = draw(values)
        case "drop":
            del place[key]
        case "rename" if isinstance(place, dict):
            place[draw(texts)] = place.pop(key)
        case _:
            place[key] = draw(st.sampled_from(["word " * 200, "</s>" * 3, "a\0b", " ", "\u202e\u0000"]))
    return row


@st.composite
def row_lists(draw, rows: list[dict]) -> list[object]:
    kept = [draw(changed_row(row)) if draw(st.integers(0, 3)) == 0 else row for row in rows[: draw(st.integers(0, 6))]]
    return kept + draw(st.lists(values, max_size=1))


def as_lines(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_parquet(rows: list[object]) -> bytes | None:
    """None for rows that parquet cannot hold."""
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([r for r in rows if isinstance(r, dict)]), sink)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return None
    return sink.getvalue()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("fuzz"))


def check(said, path: Path) -> None:
    """A result, or an error of the kinds that a person can mend, in a few readable lines."""
    assert said.code in (0, 2, 3), f"{path.read_bytes()[:500]!r}: {said.err}"
    assert "Traceback" not in said.err + said.out
    said.err.encode("utf-8")
    if said.code == 0:
        assert said.err == ""
        assert "first step:" in said.out
        return
    lines = said.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 40 and max(map(len, lines)) < 2000
    assert not any(ord(c) < 32 for c in said.err.replace("\n", ""))
    assert said.out == "", "half of an output"


def file_names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["messages", "preference"])
@fuzzed
@given(data=st.data())
def test_a_data_set_is_a_report_or_a_typed_error(space, tmp_path, kind, data):
    rows = data.draw(row_lists(CHATS if kind == "messages" else PAIRS))
    suffix = data.draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl.gz", ".parquet"]))
    content = as_parquet(rows) if suffix == ".parquet" else as_lines(rows)
    if content is None:
        return
    if suffix == ".jsonl.gz":
        content = gzip.compress(content, mtime=0)
    source = tmp_path / f"rows{suffix}"
    source.write_bytes(damaged(data.draw, content) if data.draw(st.booleans()) else content)
    keys = {
        "max_length": data.draw(st.sampled_from([2, 16, 128])),
        "on_bad_row": data.draw(st.sampled_from(["error", "skip"])),
    }
    if data.draw(st.integers(0, 3)) == 0:
        condition = {"column": "prompt", "op": data.draw(st.sampled_from(["==", "!=", ">", "in"])), "value": "a"}
        keys["filters"] = [condition]
    method = "sft" if kind == "messages" else "dpo"
    path = space.write("fuzz", method, folder=tmp_path, data={"source": str(source), "format": kind, **keys})
    before = file_names(tmp_path)
    check(run("data", path), source)
    assert file_names(tmp_path) == before


@fuzzed
@given(data=st.data())
def test_a_run_file_is_a_report_or_a_typed_error(space, tmp_path, data):
    kind = data.draw(st.sampled_from(["messages", "preference"]))
    source = space.sft_rows if kind == "messages" else space.dpo_rows
    path = tmp_path / "run.toml"
    path.write_bytes(data.draw(run_files(space, str(source), kind)))
    check(run("data", path), path)


@settings(fuzzed, max_examples=CONFIGS)
@given(data=st.data())
def test_a_damaged_run_file_loads_or_is_a_config_error(space, tmp_path, data):
    """Also what cannot be prepared in a test: names of models, sources, adapters."""
    tables = tomllib.loads(space.write("fuzz", data.draw(st.sampled_from(["sft", "dpo"]))).read_text())
    for _ in range(data.draw(st.integers(0, 4))):
        section, key = data.draw(st.sampled_from(KEYS))
        tables.setdefault(section, {})[key] = toml_able(data.draw(values))
    path = tmp_path / "run.toml"
    content = tomli_w.dumps(tables).encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(data.draw, content))
    overrides = data.draw(st.dictionaries(st.sampled_from([f"{s}.{k}" for s, k in KEYS]) | texts, texts, max_size=2))
    try:
        load_config(path, overrides)
    except ConfigError as error:
        text = str(error)
        text.encode("utf-8")
        assert max(map(len, text.splitlines())) < 2000
