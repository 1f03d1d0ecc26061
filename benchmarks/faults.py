"""Faults in a training run, by the hundred: what was tried, what survived, what was lost.

    python -m benchmarks.faults [--quick] [--only kill,damage] [--jobs 2] [--out FILE.csv]

A run survives a fault when it ends as its table row says (killed, or with its exit code and message), when at most one
step is lost, and when going on with --resume gives the tensors, the optimizer state, the counters and the logged losses
of a run without the fault, bit for bit. SFT and DPO, 1-layer Llama in 4 bits, dropout 0.1, a checkpoint a step, CPU.
"""

from __future__ import annotations

import argparse
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faulting.actions import Signal
from benchmarks.faulting.calls import EVALUATION, LOADING, MICRO_BATCH, PREPARATION, AtCall, NotFinite, Overflows
from benchmarks.faulting.comparison import differences, fingerprint
from benchmarks.faulting.damage import FILES
from benchmarks.faulting.operations import AtOperation
from benchmarks.faulting.processes import start_server
from benchmarks.faulting.ranks import Together
from benchmarks.faulting.stage import Case, Play, Stage
from benchmarks.faulting.trials import (
    all_damaged,
    disk_full,
    hurt,
    killed_at,
    killed_at_random,
    not_finite,
    out_of_memory,
    rank_killed,
    refused,
    signalled,
    stopped_once,
)
from benchmarks.meter import machine
from benchmarks.runner import commit, read_table, write_table
from lowlevel import __version__

RESULTS = Path(__file__).parent / "results" / "faults_cpu.csv"
FIELDS = ("fault", "tried", "survived", "lost", "seconds", "lowlevel", "python", "torch", "transformers", "peft",
          "bitsandbytes", "system", "commit", "started")  # fmt: skip
METHODS = ("sft", "dpo")
ERRORS = ("EIO", "EACCES", "EROFS", "ENOSPC")
TERM, INT = signal.SIGTERM, signal.SIGINT


@dataclass(frozen=True)
class Outcome:
    """A trial: how many faults it held, and what was wrong after them."""

    faults: int
    problems: Sequence[str]


Trial = Callable[[], Outcome]


def once(check: Callable[..., list[str]], *arguments: object, **keys: object) -> Trial:
    """A trial of one fault."""
    return lambda: Outcome(1, check(*arguments, **keys))


def small(stage: Stage, method: str) -> Play:
    """2 steps, one checkpoint kept: the second save deletes."""
    return stage.play(Case(method, rows=4, train=(("save_total_limit", 1),)))


def reruns(stage: Stage, scale: int) -> Iterator[Trial]:
    """Nothing at all: the precondition of everything below."""
    for method in METHODS:
        play = stage.play(Case(method))

        def again(play: Play = play) -> list[str]:
            folder = play.new()
            play.run(folder, more=())
            return differences(folder, play.whole.print)

        yield once(again)


def stops(stage: Stage, scale: int) -> Iterator[Trial]:
    """Each step of 18, for two accumulations and two optimizers."""
    for method in METHODS:
        for shape in ({"rows": 11}, {"accumulation": 3, "rows": 33}):
            for optim in ("paged_adamw_32bit", "paged_adamw_8bit"):
                play = stage.play(Case(method, epochs=3.0, optim=optim, **shape))  # type: ignore[arg-type]
                for step in range(1, play.whole.steps, 1 if scale == 1 else 6):
                    yield once(stopped_once, play, step)


def loss_scales(stage: Stage, scale: int) -> Iterator[Trial]:
    """A loss scale that falls and grows again, stopped at each step."""
    overflows = Overflows(limits=((0, 2.0**16), (1, 2.0**15), (5, 2.0**13)))
    for method in METHODS:
        play = stage.play(Case(method, rows=9, epochs=2.0, always=(overflows,)))
        for step in range(1, play.whole.steps, scale):
            yield once(stopped_once, play, step)


def random_kills(stage: Stage, scale: int) -> Iterator[Trial]:
    """Up to four kills in a row on one run."""
    for number in range(100 // scale):
        play = stage.play(Case(METHODS[number % 2], rows=11))
        rng = random.Random(number)
        yield lambda play=play, rng=rng: Outcome(*killed_at_random(play, rng, 4))  # type: ignore[misc]


def rank_kills(stage: Stage, scale: int) -> Iterator[Trial]:
    """64 of a run of two ranks, through gloo; some come after its end and do not count."""
    for method in METHODS:
        play = stage.play(Case(method, accumulation=3, rows=22, packing=False))
        folder = play.new()
        ended = Together(play, folder).wait()
        if any(one.code for one in ended):
            raise RuntimeError(f"the undisturbed run of two ranks failed: {ended}")
        wanted, seconds = fingerprint(folder), min(one.seconds for one in ended)
        for number in range(0, 32, scale):
            instant = random.Random(f"{method} {number}").uniform(0.0, 0.8 * seconds)
            yield lambda play=play, rank=number % 2, instant=instant, wanted=wanted: Outcome(  # type: ignore[misc]
                *rank_killed(play, rank, instant, wanted)
            )


def in_save(play: Play) -> set[int]:
    """Numbers of the changes that belong to a save, and the one after each."""
    return {number for first, last in play.whole.saves() for number in range(first, last + 2)}


def save_kills(stage: Stage, scale: int) -> Iterator[Trial]:
    """Before every change of every save."""
    for method in METHODS:
        play = small(stage, method)
        for change in sorted(in_save(play))[::scale]:
            yield once(killed_at, play, change)


def other_kills(stage: Stage, scale: int) -> Iterator[Trial]:
    """Before every other change."""
    for method in METHODS:
        play = small(stage, method)
        others = sorted(set(range(1, len(play.whole.operations) + 1)) - in_save(play))
        for change in others[::scale]:
            yield once(killed_at, play, change)


def full_disks(stage: Stage, scale: int) -> Iterator[Trial]:
    """In each file of a checkpoint, in each step."""
    for method in METHODS:
        play = stage.play(Case(method))
        for step in range(1, play.whole.steps + 1, scale):
            for file in FILES:
                yield once(disk_full, play, file, step)


def refusals(stage: Stage, scale: int, for_good: bool) -> Iterator[Trial]:
    """At every change; the errors in turns."""
    for method in METHODS:
        play = small(stage, method)
        for change in range(1, len(play.whole.operations) + 1, scale * (3 if for_good else 1)):
            yield once(refused, play, change, ERRORS[change % len(ERRORS)], for_good=for_good)


def three(stage: Stage, method: str) -> tuple[Play, Path]:
    """A run with three checkpoints, stopped before its last step."""
    play = stage.play(Case(method, train=(("save_total_limit", 3),)))
    return play, play.stopped_at(3)


def damages(stage: Stage, scale: int) -> Iterator[Trial]:
    """400: each kind on each file for both methods, three times and more at random places."""
    for method in METHODS:
        play, stopped = three(stage, method)
        for number in range(0, 200, scale):
            rng = random.Random(f"{method} {number}")
            yield lambda play=play, stopped=stopped, number=number, rng=rng: Outcome(  # type: ignore[misc]
                1, hurt(play, stopped, number, rng)[1]
            )


def total_losses(stage: Stage, scale: int) -> Iterator[Trial]:
    """Every checkpoint damaged: exit 4 with each of them named is what survival means here."""
    for method in METHODS:
        play, stopped = three(stage, method)
        for number in range(8):
            yield once(all_damaged, play, stopped, number, random.Random(number))


def bad_numbers(stage: Stage, scale: int) -> Iterator[Trial]:
    """Losses, gradients and weights, in each step and micro-batch."""
    for method in METHODS:
        play = stage.play(Case(method, accumulation=3, rows=18, optim="paged_adamw_8bit", packing=False))
        for step in range(2, play.whole.steps + 1):
            for value in (float("nan"), float("inf")):
                for micro_batch in (1, 2, 3)[:: 1 if scale == 1 else 3]:
                    for what in ("loss", "gradient"):
                        yield once(not_finite, play, NotFinite(what, step, value, micro_batch))
                yield once(not_finite, play, NotFinite("weights", step, value))


def memory(stage: Stage, scale: int) -> Iterator[Trial]:
    """In each micro-batch, and while the model is loaded."""
    for method in METHODS:
        play = stage.play(Case(method))
        for number in range(1, play.whole.steps + 1, scale):
            yield once(out_of_memory, play, MICRO_BATCH, number)
        yield once(out_of_memory, play, LOADING, 1)


def signals(stage: Stage, scale: int) -> Iterator[Trial]:
    """At each micro-batch, in each evaluation, at each change of a save, in preparation and loading."""
    for method in METHODS:
        play = stage.play(Case(method, accumulation=3, rows=16, evaluates=True, packing=False))
        places = [(MICRO_BATCH, n) for n in range(1, 8, scale)] + [(EVALUATION, n) for n in (1, 2, 3)]
        for target, number in [*places, (PREPARATION, 1), (LOADING, 1)]:
            for kind in (TERM, INT):
                yield once(signalled, play, AtCall(target, (number,), Signal(kind)), kind)
        saving = small(stage, method)
        for change in sorted(in_save(saving))[::scale]:
            yield once(signalled, saving, AtOperation(change, Signal(TERM)), TERM)


def second_signals(stage: Stage, scale: int) -> Iterator[Trial]:
    """A second one right after the first, in training and in saving."""
    for method in METHODS:
        play = stage.play(Case(method, accumulation=3, rows=16, evaluates=True, packing=False))
        for number in (1, 2, 4, 5):  # two micro-batches of one step, of which it has three
            fault = AtCall(MICRO_BATCH, (number, number + 1), Signal(TERM))
            yield once(signalled, play, fault, TERM, twice=True)
        saving = small(stage, method)
        for change in sorted(in_save(saving))[:: 3 * scale]:
            yield once(signalled, saving, AtOperation(change, Signal(INT), change + 1), INT, twice=True)


FAULTS: dict[str, tuple[str, Callable[[Stage, int], Iterator[Trial]]]] = {
    "rerun": ("none: the same run again", reruns),
    "stop": ("stopped in each of 18 steps", stops),
    "scale": ("stopped in each step, fp16 loss scale moving", loss_scales),
    "kill": ("SIGKILL at a random instant", random_kills),
    "rank": ("SIGKILL to one of two ranks at a random instant", rank_kills),
    "save": ("SIGKILL between two file operations of a save", save_kills),
    "between": ("SIGKILL between two other file operations", other_kills),
    "full": ("disk full in the middle of a file", full_disks),
    "refuse": ("EIO, EACCES, EROFS or ENOSPC, once", partial(refusals, for_good=False)),
    "readonly": ("the same, from some moment on", partial(refusals, for_good=True)),
    "damage": ("newest checkpoint damaged", damages),
    "lost": ("every checkpoint damaged: refused, each named", total_losses),
    "number": ("loss, gradient or weight not finite", bad_numbers),
    "memory": ("out of memory", memory),
    "signal": ("SIGTERM or SIGINT", signals),
    "twice": ("a second signal at once", second_signals),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Try the faults, print the table, write the CSV; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one in seven")
    parser.add_argument("--only", default=",".join(FAULTS), help=f"some of {','.join(FAULTS)}")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--out", type=Path, default=None, help="CSV; with --quick: none unless given")
    options = parser.parse_args(argv)
    out = options.out or (None if options.quick else RESULTS)
    same = {
        "lowlevel": __version__,
        "python": platform.python_version(),
        **{name: found for name, found in machine().items() if name in FIELDS},
        "system": f"{platform.system()} {platform.machine()}, CPU",
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    start_server()
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        stage = Stage(Path(folder))
        print("| fault | tried | survived | lost |\n|---|---:|---:|---:|", flush=True)
        for name in options.only.split(","):
            rows.append(try_all(*FAULTS[name], stage, 7 if options.quick else 1, pool) | same)
            if out:
                write_rows(out, rows)
    return int(any(row["lost"] for row in rows))


def write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Into the CSV, each in the place of an older row of the same fault."""
    named = {row["fault"]: row for row in [*read_table(out), *rows]}
    write_table(out, [named[title] for title, _ in FAULTS.values() if title in named], FIELDS)


def try_all(
    title: str, trials: Callable[[Stage, int], Iterator[Trial]], stage: Stage, scale: int, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    """One row; what went wrong goes to standard error at once."""
    began, tried, lost = time.perf_counter(), 0, 0
    for number, outcome in enumerate(pool.map(lambda trial: trial(), trials(stage, scale)), 1):
        tried += outcome.faults
        lost += bool(outcome.problems)
        for problem in outcome.problems:
            print(f"{title}, trial {number}: {problem}", file=sys.stderr, flush=True)
    seconds = round(time.perf_counter() - began, 1)
    print(f"| {title} | {tried} | {tried - lost} | {lost} |", flush=True)
    return {"fault": title, "tried": tried, "survived": tried - lost, "lost": lost, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
