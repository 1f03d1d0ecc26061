"""Several sources: shares of every prefix, no row twice, and one report over all."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowlevel.config.data import DataConfig
from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.data.mixing import interleaved
from lowlevel.data.prepare import ModelLimits, prepare
from lowlevel.errors import ConfigError, DataError

weights = st.one_of(st.integers(1, 9), st.integers(1, 100).map(lambda n: n / 100), st.floats(0.01, 50))


@given(st.lists(st.tuples(weights, st.integers(0, 80)), min_size=1, max_size=6))
def test_every_prefix_is_within_one_row_of_the_shares_and_no_row_is_left_that_fits(parts):
    shares, counts = [Fraction(repr(weight)) for weight, _ in parts], [count for _, count in parts]
    order, empty = interleaved([weight for weight, _ in parts], counts)
    taken = [0] * len(parts)
    for size, source in enumerate(order, 1):
        taken[source] += 1
        assert all(abs(n - size * share / sum(shares)) < 1 for n, share in zip(taken, shares, strict=True))
    assert all(n <= count for n, count in zip(taken, counts, strict=True))
    assert taken[empty] == counts[empty]


def test_the_order_by_hand():
    assert interleaved([0.5, 0.25, 0.25], [4, 9, 9]) == ([0, 1, 0, 2, 0, 1, 0, 2], 0)
    assert interleaved([3, 1], [100, 2]) == ([0, 0, 0, 1] * 2 + [0, 0, 0], 1)


def pair(text, **keys):
    return {"prompt": f"q {text}", "completion": f"a {text}", **keys}


@pytest.fixture
def mix(write, chatml):
    """Prepare sources of the given sizes: mix({"a": 30, "b": 10}, weights, **DataConfig keys)."""

    def _mix(sizes, weights=(), method="sft", **keys):
        paths = [write(*[pair(f"{n}{i}") for i in range(size)], name=f"{n}.jsonl") for n, size in sizes.items()]
        weighted = zip(paths, weights or [None] * len(paths), strict=True)
        data = DataConfig(sources=[{"source": path, "weight": weight} for path, weight in weighted], **keys)
        return prepare(RunConfig(method=method, data=data), chatml, ModelLimits(1000, 4096))

    return _mix


def test_without_weights_the_rows_are_those_of_one_file(mix, run, write):
    one = write(*[pair(f"{n}{i}") for n, size in (("a", 5), ("b", 3)) for i in range(size)])
    for keys in ({}, {"shuffle_seed": 3, "limit": 6}, {"shuffle_seed": 1, "eval_source": "holdout", "eval_limit": 2}):
        mixed, single = mix({"a": 5, "b": 3}, **keys), run(one, **keys)
        assert mixed.report.train.fingerprint == single.report.train.fingerprint
        assert [e.row for e in mixed.train] == [e.row for e in single.train]
        assert [e.row for e in mixed.evaluation] == [e.row for e in single.evaluation]
    assert [e.where for e in mix({"a": 1, "b": 1}).train] == ["a.jsonl:1", "b.jsonl:1"]


def test_weights_are_shares_of_the_rows_until_a_source_ends(mix):
    assert [e.where[0] for e in mix({"a": 30, "b": 10}, (3, 1)).train[:8]] == list("aaabaaab")
    data = mix({"a": 30, "b": 10}, (1, 1))
    assert [e.where for e in data.train[:4]] == ["a.jsonl:1", "b.jsonl:1", "a.jsonl:2", "b.jsonl:2"]
    assert len({e.row for e in data.train}) == len(data.train) == 21
    report = data.report.to_json()["train"]
    assert (report["rows_read"], report["rows_selected"], report["rows_kept"]) == (40, 21, 21)
    assert report["warnings"] == {"rows left over when b.jsonl ends": 19}
    assert report["sources"] == (
        {"source": "a.jsonl", "rows_read": 30, "rows_kept": 11, "share": 11 / 21, "share_wanted": 0.5},
        {"source": "b.jsonl", "rows_read": 10, "rows_kept": 10, "share": 10 / 21, "share_wanted": 0.5},
    )


@pytest.mark.parametrize(
    ("keys", "size", "warning"),
    [
        ({"limit": 12}, 12, {}),
        ({"limit": 50}, 21, {"rows left over when b.jsonl ends, before data.limit 50": 19}),
        ({"limit": 12, "eval_source": "holdout", "eval_limit": 4, "shuffle_seed": 0}, 12, {}),
    ],
)
def test_limit_and_holdout_take_from_the_mix(mix, keys, size, warning):
    data = mix({"a": 30, "b": 10}, (0.5, 0.5), **keys)
    sources = [e.where[0] for e in [*data.train, *data.evaluation]]
    assert len(data.train) == size and abs(sources.count("a") - sources.count("b")) <= 1
    assert data.report.train.warnings == warning
    assert not {e.row for e in data.train} & {e.row for e in data.evaluation}
    assert [part.rows_kept for part in data.report.evaluation.sources] == [2, 2] if data.evaluation else True


def prepared(tokenizer, *sources, method="sft", **data):
    tables = {"method": method, "data": {"max_length": 256, "sources": list(sources), **data}}
    return prepare(config_from_tables(tables, "run.toml"), tokenizer, ModelLimits(1000, 4096))


def test_each_source_has_its_format_and_its_filters(write, chatml):
    orca = write({"system": "", "input": "q", "chosen": "a", "rejected": "b", "score": 9}, name="orca.jsonl")
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "d", "ok": i % 2 == 0} for i in range(4)]
    own = {"column": "ok", "op": "==", "value": False}
    data = prepared(
        chatml,
        {"source": orca, "format": "orca"},
        {"source": write(*pairs, name="pairs.jsonl"), "filters": [own]},
        method="dpo",
    )
    assert [e.where for e in data.train] == ["orca.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:4"]
    assert data.report.train.filtered == {"ok == false": 2}
    with pytest.raises(ConfigError, match='pairs.jsonl has no column "score"; found: chosen, ok, prompt, rejected'):
        prepared(
            chatml,
            {"source": orca, "format": "orca"},
            {"source": write(*pairs, name="pairs.jsonl")},
            method="dpo",
            filters=[{"column": "score", "op": ">", "value": 1}],
        )


def test_each_source_is_recognised_by_its_own_columns(write, kit, chatml):
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    paths = write(kit.chat("hi", "yo"), name="chat.jsonl"), write(shared, name="shared.jsonl")
    data = prepared(chatml, *({"source": path, "weight": 1} for path in paths))
    assert [e.where for e in data.train] == ["chat.jsonl:1", "shared.jsonl:1"]
    assert data.report.train.read_as == "ShareGPT: conversations (shared.jsonl)"
    assert data.report.format == "messages, sharegpt"


def test_files_of_one_name_are_told_apart_and_problems_name_their_source(write, tmp_path, chatml):
    for folder in ("en", "de"):
        (tmp_path / folder).mkdir()
    good, bad = write(pair(1), name="en/x.jsonl"), write(pair(2), b"?\n", name="de/x.jsonl")
    with pytest.raises(DataError, match=r"^de/x.jsonl:2: not valid JSON"):
        prepared(chatml, {"source": good}, {"source": bad})
    data = prepared(chatml, {"source": good}, {"source": bad}, on_bad_row="skip")
    assert [(e.row, e.where) for e in data.train] == [(0, "en/x.jsonl:1"), (1, "de/x.jsonl:1")]
    assert [part.source for part in data.report.train.sources] == ["en/x.jsonl", "de/x.jsonl"]


def test_one_file_twice_needs_filters_that_keep_different_rows(write, chatml):
    path = write(*[pair(i, lang="en" if i % 3 else "de") for i in range(9)])
    by_lang = [
        {"source": path, "weight": 1, "filters": [{"column": "lang", "op": "==", "value": lang}]}
        for lang in ("en", "de")
    ]
    assert len(prepared(chatml, *by_lang).train) == 7
    with pytest.raises(ConfigError, match=r"train.jsonl:2 is in sources 1 and 2 of data.sources: a row is trained"):
        prepared(chatml, by_lang[0], {"source": path, "weight": 1})


def test_a_source_is_not_its_own_evaluation(mix, tmp_path):
    with pytest.raises(ConfigError, match="is also the training source"):
        mix({"a": 2, "b": 2}, eval_source=str(tmp_path / "b.jsonl"))


A, B = {"source": "a.jsonl", "weight": 1}, {"source": "b.jsonl"}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"source": "c.jsonl", "sources": [B]}, "data.source and data.sources are both set: give one of them"),
        ({"split": "test", "sources": [B]}, "data.split is not used with data.sources: give each source its split"),
        ({"sources": [A, B]}, "source 2 (b.jsonl) has no weight: give all sources a weight, or none"),
        ({"sources": [{**B, "format": "orca"}]}, 'format "orca" does not fit sft'),
        ({"sources": [{**B, "weight": 0}]}, "data.sources.0.weight: expected greater than 0, got 0"),
        ({"sources": [{**B, "wieght": 1}]}, 'unknown key "data.sources.0.wieght"; did you mean "weight"?'),
        ({"sources": [{"weight": 1}]}, "data.sources.0.source: is missing"),
        (
            {"sources": [{**B, "filters": [{"column": "a", "op": "==", "value": {}}]}]},
            "data.sources.0.filters.0.value: expected text, a n",
        ),
        ({"sources": [{"source": [{"prompt": "q"}]}]}, "data.sources.0.source: expected a string"),
    ],
)
def test_contradictions_are_one_line(data, line):
    with pytest.raises(ConfigError) as caught:
        config_from_tables({"data": data}, "run.toml")
    assert line in str(caught.value).splitlines()[0]


def test_the_saved_file_reads_back_and_without_sources_it_is_as_before():
    config = config_from_tables({"data": {"sources": [A, {**A, "source": "b.jsonl", "weight": 0.5}]}}, "run.toml")
    assert config_from_tables(to_tables(config), "config.toml") == config
    assert not {"source", "split"} & to_tables(config)["data"].keys()
    assert "sources" not in to_tables(RunConfig())["data"]
