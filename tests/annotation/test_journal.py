"""The journal: what was confirmed is there after a kill at any byte; the preference file follows from it."""

import json
import os
from collections import Counter
from dataclasses import replace

import pytest
from hostile import HEADER, PAIRS, RUNS

from lowlevel.annotation import journal as module
from lowlevel.annotation.journal import Conflict, Journal, journal_path
from lowlevel.errors import ConfigError, DataError


def test_a_judgement_becomes_a_row_with_its_origin(journal_of, rows):
    with journal_of() as journal:
        journal.judge("ada", 0, "left", None)
        journal.judge("ada", 1, "tie", None)
        journal.judge("ada", 2, "bad", None)
        left = journal.left("ada", 0)
    (row,) = rows()
    assert row["prompt"] == PAIRS[0].prompt
    texts = PAIRS[0].replies
    assert row["chosen"] == [{"role": "assistant", "content": texts[left]}]
    assert row["rejected"] == [{"role": "assistant", "content": texts[1 - left]}]
    origin = row["provenance"]
    assert origin["chosen"] == {**RUNS[left], "side": "left", "ended": PAIRS[0].ended[left]}
    assert origin["rejected"] == {**RUNS[1 - left], "side": "right", "ended": PAIRS[0].ended[1 - left]}
    assert (origin["annotator"], origin["sampling"]) == ("ada", HEADER["sampling"])
    assert origin["time"].endswith("+00:00")


@pytest.mark.parametrize("choice", ["left", "bad"])
def test_a_written_reply_is_chosen_over_both(journal_of, rows, choice):
    with journal_of() as journal:
        journal.judge("ada", 1, choice, "  better\n")
    assert [row["chosen"][0]["content"] for row in rows()] == ["  better\n"] * 2
    assert {row["rejected"][0]["content"] for row in rows()} == set(PAIRS[1].replies)
    assert rows()[0]["provenance"]["chosen"] == {"written_by": "ada"}


@pytest.mark.parametrize(("choice", "pair", "written"), [("up", 0, None), ("left", 9, None), ("left", 1, " plain ")])
def test_what_is_no_judgement_is_refused(journal_of, choice, pair, written):
    with journal_of() as journal:
        with pytest.raises(ValueError):
            journal.judge("ada", pair, choice, written)
        assert not journal.judgements


def test_undo_takes_back_the_last_judgement_once(journal_of, rows):
    with journal_of() as journal:
        for pair in (0, 1):
            journal.judge("ada", pair, "left", None)
        journal.judge("bo", 0, "left", None)
        with pytest.raises(Conflict):
            journal.undo("ada", 0)
        assert journal.undo("ada", 1).choice == "left"
        with pytest.raises(Conflict):
            journal.undo("ada", 1)
        assert journal.next_pair("ada") == 1
        journal.judge("ada", 1, "right", None)
    assert [row["provenance"]["choice"] for row in rows()] == ["left", "left", "right"]
    with journal_of(resume=True) as again:
        assert again.judgements == journal.judgements and list(again.judgements) == list(journal.judgements)


def test_a_kill_at_any_byte_loses_nothing_that_was_confirmed(journal_of, out, rows):
    with journal_of() as journal:
        sizes = [journal.path.stat().st_size]
        for pair, written in enumerate([None, "ünïcode\u2028\n", None]):
            journal.judge("ada", pair, "left", written)
            sizes.append(journal.path.stat().st_size)
        kept, whole = dict(journal.judgements), journal.path.read_bytes()
    for size in sorted({*range(sizes[0], sizes[-1], 23), *sizes, *(size - 1 for size in sizes[1:])}):
        journal.path.write_bytes(whole[:size])
        confirmed = sum(size >= end for end in sizes[1:])
        with journal_of(resume=True) as again:
            assert list(again.judgements.values()) == list(kept.values())[:confirmed]
            again.judge("ada", 3, "tie", None)
            assert len(Journal(journal.path).judgements) == confirmed + 1


def test_a_kill_while_the_pairs_are_written_begins_anew(journal_of, out):
    with journal_of() as journal:
        whole = journal.path.read_bytes()
    out.unlink()
    journal.path.write_bytes(whole[: len(whole) // 2])
    fewer = [replace(PAIRS[0], where="new")]
    with journal_of(pairs=fewer) as again:
        assert again.pairs == fewer == Journal(journal.path).pairs


def test_a_judgement_is_on_disk_before_it_counts(journal_of, monkeypatch):
    calls, fsync = [], os.fsync

    def synced(descriptor):
        calls.append((os.readlink(f"/proc/self/fd/{descriptor}"), len(journal.judgements)))
        fsync(descriptor)

    with journal_of() as journal:
        monkeypatch.setattr(os, "fsync", synced)
        journal.judge("ada", 0, "left", None)
    assert calls[0] == (str(journal.path), 0)


def test_a_full_disk_saves_nothing_and_says_so(journal_of, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with journal_of() as journal:
        before = journal.path.read_bytes()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "fsync", full)
            journal.judge("ada", 0, "left", None)
        assert not journal.judgements and journal.path.read_bytes() == before
        journal.judge("ada", 0, "right", None)
    assert [one.choice for one in Journal(journal.path).judgements.values()] == ["right"]


def test_only_one_server_at_a_time(journal_of):
    with journal_of() as journal, pytest.raises(ConfigError, match="in use"), journal_of(resume=True):
        pass
    assert Journal(journal.path).pairs == PAIRS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": {**HEADER["sampling"], "seed": 1}}, "sampling"),
        ({"prompts": {"source": "other.jsonl", "sha256": "11"}}, "prompts"),
        ({"runs": RUNS[:1]}, r"runs \['out/a', 'out/b'\], not \['out/a'\]"),
    ],
)
def test_resume_refuses_other_settings(journal_of, change, named):
    with journal_of():
        pass
    with pytest.raises(ConfigError, match=named), journal_of(resume=True, header={**HEADER, **change}):
        pass
    later = [{**RUNS[0], "adapter_sha256": "trained on"}, RUNS[1]]
    with journal_of(resume=True, header={**HEADER, "runs": later}) as journal:
        assert journal.header["runs"] == RUNS


def test_nothing_is_overwritten(journal_of, out):
    with journal_of() as journal:
        journal.judge("ada", 0, "left", None)
    with pytest.raises(ConfigError, match="1 judgement: continue with --resume"), journal_of():
        pass
    os.remove(journal.path)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="choose another name"), journal_of(resume=resume):
            pass
    assert out.exists() and not journal.path.exists()


def test_a_damaged_line_is_named(journal_of):
    with journal_of() as journal:
        pass
    lines = journal.path.read_text().splitlines()
    for number, line in ((1, '{"format": "other"}'), (3, "[]"), (5, "{")):
        journal.path.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]) + "\n")
        with pytest.raises(DataError, match=f":{number}: not a line"):
            Journal(journal.path)


def test_the_journal_lies_beside_the_preference_file(out):
    assert journal_path(out).name == "prefs.judgements.jsonl"
    assert journal_path(journal_path(out)) == journal_path(out)


def test_the_header_says_what_was_left_out(out):
    with module.open_journal(out, HEADER, lambda: (PAIRS, Counter({"two equal replies": 2})), resume=False) as journal:
        head = json.loads(journal.path.read_text().splitlines()[0])
    assert head["left_out"] == {"two equal replies": 2} and head["pairs"] == 4
