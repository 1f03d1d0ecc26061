"""The runs that faults are tried on: a 1-layer Llama in 4 bits, a few rows, dropout 0.1, a checkpoint a step."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.faulting.comparison import damaged, differences, fingerprint, litter, logged, newest_good
from benchmarks.faulting.operations import Record
from benchmarks.faulting.processes import ROOT, Ended, Fault, Started, lowlevel

ROWS = 33


@dataclass(frozen=True)
class Case:
    """A kind of run. `always` are faults that belong to it: they act in the uninterrupted run too."""

    method: str = "sft"
    accumulation: int = 1
    rows: int = 7  # 2 a micro-batch: 4 steps an epoch, the last of one row
    epochs: float = 1.0
    optim: str = "paged_adamw_32bit"
    evaluates: bool = False
    packing: bool = True  # without, a micro-batch has exactly 2 rows
    train: tuple[tuple[str, Any], ...] = ()
    always: tuple[Fault, ...] = ()

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """What goes over the workspace's own run file."""
        data = {
            "limit": self.rows,
            "packing": self.packing,
            **({"eval_source": "holdout", "eval_limit": 2} if self.evaluates else {}),
        }
        train = {
            "gradient_accumulation_steps": self.accumulation,
            "num_train_epochs": self.epochs,
            "max_steps": None,
            "warmup_ratio": 0.2,
            "optim": self.optim,
            "logging_steps": 1,
            "save_steps": 1,
            **({"eval_steps": 2} if self.evaluates else {}),
            **dict(self.train),
        }
        more = {"dpo": {"disable_dropout": False}} if self.method == "dpo" else {}
        return {"data": data, "train": train, "lora": {"r": 8}, **more}


@dataclass
class Stage:
    """A folder with a base, rows, run files, and the uninterrupted run of each case, made when first asked for."""

    folder: Path
    _plays: dict[Case, Play] = field(default_factory=dict)
    _names: Iterator[int] = field(default_factory=count)  # also for threads

    @cached_property
    def workspace(self) -> Any:
        """tests/workspace.py's: the base has one layer here, and there are enough rows for 18 steps of 2 x 3."""
        sys.path.append(str(ROOT / "tests"))
        import helpers
        from workspace import Workspace

        self.folder.mkdir(parents=True, exist_ok=True)
        helpers.write_tiny_base(self.folder / "tiny", num_hidden_layers=1)
        texts = [f"{'very ' * (i % 4)}short text number {i}" for i in range(ROWS)]
        chats = [
            {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1][: 6 + i % 9]}]}
            for i, t in enumerate(texts)
        ]
        pairs = [{"prompt": t, "chosen": t[::-1], "rejected": "no " * (1 + i % 3)} for i, t in enumerate(texts)]
        sft, dpo = (helpers.write_jsonl(self.folder / f"{n}.jsonl", r) for n, r in (("chats", chats), ("pairs", pairs)))
        return Workspace(self.folder, self.folder / "tiny", sft, dpo)

    @cached_property
    def parent(self) -> Path:
        """The adapter that dpo runs stand on."""
        import helpers

        return Path(helpers.save_random_adapter(self.workspace.base, self.folder / "sft-adapter"))

    def play(self, case: Case) -> Play:
        """A case with its uninterrupted run."""
        if case not in self._plays:
            name = f"{case.method}-{len(self._plays)}"
            model = {"name": str(self.workspace.base)} | ({"adapter": str(self.parent)} if case.method == "dpo" else {})
            config = self.workspace.write(name, case.method, model=model, **case.sections)
            self._plays[case] = Play(self, case, config)
        return self._plays[case]

    def place(self) -> Path:
        """A new run folder's path."""
        return self.folder / "runs" / f"{next(self._names):05d}" / "run"


@dataclass
class Play:
    """A case on its stage."""

    stage: Stage
    case: Case
    config: Path

    @cached_property
    def whole(self) -> Whole:
        """The uninterrupted run, with each change that it made to its folder."""
        folder = self.new()
        record = Record(folder.parent / "operations")
        ended = lowlevel(self.arguments(folder), folder, *self.case.always, record)
        if ended.code != 0:
            raise RuntimeError(f"the uninterrupted run failed: {ended.said}")
        return Whole(folder, ended, record.read(), fingerprint(folder))

    def new(self) -> Path:
        """A new run folder's path; its own parent folder exists."""
        folder = self.stage.place()
        folder.parent.mkdir(parents=True)
        return folder

    def copy(self, of: Path) -> Path:
        """A copy of a run folder, to be hurt."""
        folder = self.new()
        shutil.copytree(of, folder, symlinks=True)
        return folder

    def arguments(self, folder: Path, *more: str) -> list[str]:
        """What to type for a run in `folder`."""
        return [self.case.method, str(self.config), "--train.output_dir", str(folder), *more]

    def run(self, folder: Path, *faults: Fault, more: Sequence[str] = ("--resume",)) -> Ended:
        """Start or resume in `folder`, to the end."""
        return lowlevel(self.arguments(folder, *more), folder, *self.case.always, *faults)

    def start(self, folder: Path, *faults: Fault) -> Started:
        """The same without waiting."""
        return Started(self.arguments(folder, "--resume"), folder, (*self.case.always, *faults))

    def stopped_at(self, step: int) -> Path:
        """A new run, ended by SIGTERM in `step`."""
        import signal

        from benchmarks.faulting.actions import Signal
        from benchmarks.faulting.calls import STEP, AtCall

        folder = self.new()
        ended = self.run(folder, AtCall(STEP, (step,), Signal(signal.SIGTERM)), more=())
        if ended.code != 143:
            raise RuntimeError(f"not stopped at step {step}: {ended.code} {ended.said}")
        return folder

    def lost(self, folder: Path, *, damage: bool = False) -> list[str]:
        """What an interruption has cost beyond one step, and checkpoints that are not whole: nothing, it should be."""
        taken = max((line["step"] for line in logged(folder)), default=0)
        problems = [] if damage else damaged(folder)
        if taken - newest_good(folder) > 1 and not damage:
            problems.append(f"step {taken} was logged, the newest checkpoint is of step {newest_good(folder)}")
        return problems

    def resumed(self, folder: Path) -> list[str]:
        """Resume without a fault to the end: what is then not as in the uninterrupted run, and what was left lying."""
        ended = self.run(folder)
        if ended.code != 0:
            return [f"resume ended with {ended.code}: {ended.said.strip()[-400:]}"]
        return self.compared(folder)

    def compared(self, folder: Path) -> list[str]:
        """What is not as in the uninterrupted run, and what was left lying."""
        return [f"differs: {name}" for name in differences(folder, self.whole.print)] + [
            f"left over: {name}" for name in litter(folder)
        ]


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    folder: Path
    ended: Ended
    operations: list[str]
    print: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.print["state"]["step"])

    def saves(self) -> list[tuple[int, int]]:
        """First and last change (counted from 1) of each save, the deletion of older checkpoints included."""
        spans, begin = [], 0
        for number, change in enumerate(self.operations, 1):
            if not begin and re.fullmatch(r"mkdir \.tmp-step-\d+", change):
                begin = number
            elif begin and change.startswith("open .tmp-run-status"):
                spans.append((begin, number - 1))
                begin = 0
        return spans
