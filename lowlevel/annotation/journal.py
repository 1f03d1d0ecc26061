"""The journal of an annotation: a file that only grows, from which everything else follows.

    {"format": ..., "runs": [...], "prompts": ..., "sampling": {...}, "pairs": 40, ...}     first line
    {"pair": {"where", "prompt", "replies", "ended"}}                                      40 lines
    {"judgement": {"pair", "annotator", "left", "choice", "time", "written"}}              one at a time, then fsync
    {"undo": {"pair", "annotator", "time"}}

A kill can cut the last line. It was never confirmed to the page, so the next start removes it. The preference file is
made anew from the journal after each judgement.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from lowlevel.annotation.pairs import CHOICES, Judgement, Pair, preference_rows, reply_on_left
from lowlevel.data.texts import is_blank
from lowlevel.durable import append_line, disk_errors, given_file, sync
from lowlevel.errors import ConfigError, DataError, how_many

FORMAT = "lowlevel annotate 1"
SUFFIX = ".judgements.jsonl"
FIXED = ("runs", "prompts", "sampling")  # of the header: what --resume must not change
Header = dict[str, Any]


class Conflict(Exception):  # noqa: N818 - an answer to the page, not a failure
    """The page did not know of an earlier judgement or undo."""


def journal_path(out: Path) -> Path:
    """The journal of a preference file; a journal is its own."""
    return out if out.name.endswith(SUFFIX) else out.with_name(out.name.removesuffix(".jsonl") + SUFFIX)


class Journal:
    """Header, pairs and valid judgements; `judge` and `undo` return once they are on disk, and are thread-safe."""

    def __init__(self, path: Path, out: Path | None = None) -> None:
        """Read a journal. `out` is the preference file to keep up to date. Raises DataError for damaged lines."""
        self.path, self.out, self.lock = path, out, Lock()
        self.header: Header = {}
        self.pairs: list[Pair] = []
        self.judgements: dict[tuple[str, int], Judgement] = {}  # by annotator and pair, in order of time
        for number, line in enumerate(_whole_lines(path), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{path}:{number}: not a line of lowlevel annotate") from None

    @property
    def complete(self) -> bool:
        """Whether all pairs were written: a kill while sampling leaves fewer."""
        return bool(self.header) and len(self.pairs) == self.header["pairs"]

    def begin(self, header: Header, pairs: Sequence[Pair]) -> None:
        """Write header and pairs into the empty journal."""
        records = [{"format": FORMAT, **header, "pairs": len(pairs), "time": _now()}]
        records += [{"pair": asdict(pair)} for pair in pairs]
        with disk_errors(self.path), open(self.path, "wb") as file:  # the same file, which is locked
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        sync(self.path)
        self.header, self.pairs, self.judgements = records[0], list(pairs), {}

    def last(self, annotator: str) -> Judgement | None:
        """The newest judgement of an annotator."""
        return next((one for one in reversed(self.judgements.values()) if one.annotator == annotator), None)

    def next_pair(self, annotator: str) -> int | None:
        """The first pair that the annotator has not judged. Each sees every pair, in the order of the file."""
        return next((i for i in range(len(self.pairs)) if (annotator, i) not in self.judgements), None)

    def left(self, annotator: str, pair: int) -> int:
        """The number of the reply that this annotator has on the left."""
        return reply_on_left(self.header["sampling"]["seed"], pair, annotator)

    def judge(self, annotator: str, pair: int, choice: str, written: str | None) -> None:
        """Save a judgement. Raises Conflict if the pair has one; ValueError for what is none."""
        if choice not in CHOICES or not 0 <= pair < len(self.pairs):
            raise ValueError(f"no judgement: choice {choice!r} of pair {pair}")
        if written is not None and is_blank(written):
            written = None
        if written is not None and written.strip() in [reply.strip() for reply in self.pairs[pair].replies]:
            raise ValueError("the text that you wrote is one of the two replies: change it, or remove it")
        with self.lock:
            if (annotator, pair) in self.judgements:
                raise Conflict("this pair was judged before, perhaps in another tab")
            judged = Judgement(pair, annotator, self.left(annotator, pair), choice, _now(), written)
            self._save({"judgement": asdict(judged)})

    def undo(self, annotator: str, pair: int) -> Judgement:
        """Take back the newest judgement of an annotator. Raises Conflict if it is not of this pair."""
        with self.lock:
            last = self.last(annotator)
            if last is None or last.pair != pair:
                raise Conflict("this judgement is not your last one, or was taken back before")
            self._save({"undo": {"pair": pair, "annotator": annotator, "time": _now()}})
            return last

    def write_preferences(self) -> int:
        """Write the preference file; its number of rows."""
        rows = list(preference_rows(self.header, self.pairs, self.judgements.values()))
        if self.out is not None:
            with given_file(self.out) as target:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                target.write_text(text, encoding="utf-8")
        return len(rows)

    def _save(self, record: dict[str, Any]) -> None:
        append_line(self.path, record, synced=True)
        self._apply(record)
        with suppress(OSError):  # it is saved; the end of the session writes this file again and says what fails
            self.write_preferences()

    def _apply(self, record: dict[str, Any]) -> None:
        if not self.header:
            if record["format"] != FORMAT:
                raise ValueError
            self.header = record
        elif pair := record.get("pair"):
            both = {key: tuple(pair[key]) for key in ("replies", "ended")}
            self.pairs.append(Pair(**{**pair, **both}))
        elif judged := record.get("judgement"):
            one = Judgement(**judged)
            self.judgements.pop((one.annotator, one.pair), None)
            self.judgements[one.annotator, one.pair] = one
        else:
            self.judgements.pop((record["undo"]["annotator"], record["undo"]["pair"]))


@contextmanager
def open_journal(
    out: Path, header: Header, sample: Callable[[], tuple[list[Pair], Counter[str]]], *, resume: bool
) -> Iterator[Journal]:
    """The locked journal of `out`: a new one with pairs from `sample`, or with `resume` the one that is there.

    Raises ConfigError if it is in use, there without `resume`, or begun with other runs, prompts or sampling.
    """
    path = journal_path(out)
    if out.exists() and not path.exists():
        raise ConfigError(f"--out {out} exists, and there is no {path.name}: choose another name")
    with open(path, "a+b") as file:  # it holds the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path} is in use by another lowlevel annotate") from None
        file.truncate(sum(map(len, _whole_lines(path))))
        journal = Journal(path, out)
        if journal.complete:
            _check_same(journal, header, resume)
        else:
            try:
                pairs, left_out = sample()
            except BaseException:
                path.unlink()
                raise
            journal.begin({**header, "left_out": left_out}, pairs)
        journal.write_preferences()
        yield journal


def _check_same(journal: Journal, header: Header, resume: bool) -> None:
    if not resume:
        held = how_many(len(journal.judgements), "judgements")
        raise ConfigError(f"{journal.path} holds {held}: continue with --resume, or choose another --out")
    was = journal.header
    names = [[run["run"] for run in one["runs"]] for one in (was, header)]  # a run may have gone on since
    for key, old, new in (("runs", *names), *((key, was[key], header[key]) for key in FIXED[1:])):
        if old != new:
            raise ConfigError(f"{journal.path} was begun with {key} {old}, not {new}: give the same, or another --out")


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
