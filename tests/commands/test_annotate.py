"""`lowlevel annotate` from two runs to a preference file that `lowlevel dpo` takes."""

import json
import socket
from pathlib import Path

import pytest
from helpers import write_jsonl
from workspace import PROMPTS

from lowlevel.annotation.pairs import Pair
from lowlevel.annotation.replies import read_prompts
from lowlevel.annotation.server import AnnotationServer
from lowlevel.errors import DataError


@pytest.fixture
def prompts(tmp_path) -> Path:
    turns = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "no"}]
    rows = [{"prompt": text} for text in PROMPTS[:6]] + [{"messages": [*turns, {"role": "user", "content": "again"}]}]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def seen(monkeypatch) -> list[list[Pair]]:
    """The pairs that each server had; a person judges the next two left, one as a tie, and presses Ctrl-C."""
    seen = []

    def serve(server):
        journal = server.journal
        seen.append(journal.pairs)
        for choice in ("left", "left", "tie"):
            if (pair := journal.next_pair("ada")) is not None:
                journal.judge("ada", pair, choice, None)
        raise KeyboardInterrupt

    monkeypatch.setattr(AnnotationServer, "serve_forever", serve)
    return seen


def annotate(cli, *arguments):
    return cli("annotate", *arguments, "--max-new-tokens", 12)


def test_from_two_runs_to_a_run_of_dpo(runs, cli, prompts, seen, tmp_path):
    out = tmp_path / "prefs.jsonl"
    command = (runs.dpo, "--other", runs.sft, "--prompts", prompts, "--out", out)
    first = annotate(cli, *command)
    assert first.code == 0, first.err
    assert "http://127.0.0.1:" in first.out and f"win rate: {runs.dpo} over {runs.sft}" in first.out
    assert annotate(cli, *command).code == 2
    again = annotate(cli, *command, "--resume")
    assert again.code == 0, again.err
    assert seen[0] == seen[1] and len(seen[0]) >= 6
    assert "6 judgements by ada (6)" in again.out and "4 preference rows" in again.out
    assert cli("annotate", "--report", out).out.splitlines()[0] == f"{len(seen[0])} pairs, 6 judgements by ada (6)"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        origin = row["provenance"]
        assert {origin["chosen"]["run"], origin["rejected"]["run"]} == {str(runs.dpo), str(runs.sft)}
        assert origin["sampling"] == {"max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    folder = runs.space.write("more", "dpo", folder=tmp_path, data={"source": str(out)}, train={"max_steps": 1})
    trained = cli("dpo", folder)
    assert trained.code == 0, trained.err


def test_two_replies_of_one_run_differ_and_are_reproducible(runs, cli, prompts, seen, tmp_path):
    for name in ("a", "b"):
        said = annotate(cli, runs.sft, "--prompts", prompts, "--out", tmp_path / f"{name}.jsonl")
        assert said.code == 0, said.err
        assert "win rate" not in said.out
    assert seen[0] == seen[1]
    assert all(pair.replies[0] != pair.replies[1] for pair in seen[0])


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("RUN",), 2, "needs --prompts, --out"),
        (("RUN", "--prompts", "FILE", "--out", "OUT", "--temperature", "0"), 2, "two equal replies"),
        (("RUN", "--prompts", "none", "--out", "OUT"), 2, "--prompts none: no such file"),
        (("elsewhere", "--prompts", "FILE", "--out", "OUT"), 2, "not a run folder"),
        (("RUN", "--prompts", "FILE", "--out", "none/x.jsonl"), 2, "no such folder"),
        (("--report", "none.jsonl"), 2, "none.judgements.jsonl"),
        (("RUN", "--prompts", "FILE", "--out", "OUT", "--max-new-tokens", "1"), 3, "no prompt has two different"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(runs, cli, prompts, tmp_path, words, code, named, monkeypatch):
    if code == 3:
        monkeypatch.setattr("lowlevel.annotation.session.sample_pairs", lambda *given: ([], {"an empty reply": 7}))
    out = tmp_path / "out.jsonl"
    places = {"RUN": runs.sft, "FILE": prompts, "OUT": out}
    said = cli("annotate", *(places.get(word, word) for word in words))
    assert (said.code, said.err.count("\n")) == (code, 1) and named in said.err
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"question": "x"}, 'needs "prompt" or "messages"; found: question'),
        ({"prompt": [{"role": "system", "content": "x"}]}, "does not end with a message of the user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "does not end with a message of the user"),
        ({"prompt": 3}, '"prompt" is a number'),
        ({"prompt": "x", "tools": [{"type": "function"}]}, '"tools" cannot be shown'),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(tmp_path, row, named):
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(DataError, match=f"prompts.jsonl:2: .*{named}"):
        read_prompts(str(file))


def test_the_last_reply_of_a_conversation_is_no_part_of_its_prompt(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": [*turns, turns[0]]}])
    assert [messages for _, messages in read_prompts(str(file))] == [turns[:1], [*turns, turns[0]]]
    assert len(read_prompts("demo")) == 240


def test_a_port_is_checked_before_anything_is_sampled(cli, tmp_path):
    said = cli("annotate", tmp_path, "--prompts", "demo", "--out", tmp_path / "p.jsonl", "--port", 70_000)
    assert said.code == 2 and said.err.startswith("error: --port 70000: at most 65535"), said.err


def test_a_taken_port_is_named_before_anything_is_sampled(runs, cli, prompts, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, out = taken.getsockname()[1], tmp_path / "p.jsonl"
        said = annotate(cli, runs.sft, "--prompts", prompts, "--out", out, "--port", port)
    assert said.code == 2 and said.err.startswith(f"error: --port {port}: "), said.err
    assert list(tmp_path.iterdir()) == [prompts]
