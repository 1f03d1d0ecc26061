"""What a person sees while a run trains: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_KEYS = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "eval_rewards/accuracies": "eval_accuracy {:.3f}",
    "rewards/margins": "margin {:.4f}",
    "grad_norm": "grad_norm {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_allocated_gib": "{:.2f} GiB",
    "skipped_steps": "{} skipped",
}
HIDE_AT_ZERO = ("peak_allocated_gib", "skipped_steps")


class PipedConsole(Console):
    """A console whose reader may leave: rich would end the process as if it had failed."""

    def on_broken_pipe(self) -> None:
        """Say so to the caller."""
        raise BrokenPipeError


def make_console() -> Console:
    """Standard output; a plain stream gets long lines instead of lines wrapped at 80 columns."""
    terminal = sys.stdout.isatty()
    return PipedConsole(highlight=False, soft_wrap=not terminal, width=None if terminal else 140)


def quiet_libraries() -> None:
    """Switch off progress bars and advice of libraries; their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_loading_bar

    disable_progress_bar()
    disable_loading_bar()
    # bitsandbytes 0.50 advises on CPUs with AVX512-BF16 to download a kernel from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 renamed gradient_checkpointing_enable; PEFT 0.21 calls it by the only name that 5.17 knows.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def lines_to(console: Console) -> Callable[[str], None]:
    """What prints a line as it is: a path may hold what rich reads as markup."""
    return lambda line: console.print(line, markup=False)


def describe(record: dict[str, Any]) -> str:
    """One line for a logged record."""
    shown = [
        form.format(record[key])
        for key, form in LINE_KEYS.items()
        if key in record and not (key in HIDE_AT_ZERO and not record[key])
    ]
    return "  ".join(shown)


class TrainingProgress:
    """A bar over optimizer steps with time left, and the newest record beside it."""

    def __init__(self, console: Console, name: str, total_steps: int, start: int) -> None:
        """A bar from `start` to `total_steps`; drawn only in a terminal."""
        self.console, self.total_steps = console, total_steps
        self.live = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[last]}"), console=console)
        self.task = self.bar.add_task(name, total=total_steps, completed=start, last="")

    def __enter__(self) -> TrainingProgress:
        """Start drawing."""
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing, and leave the last state on the screen."""
        if self.live:
            self.bar.stop()

    def step(self, step: int) -> None:
        """A step has been applied."""
        self.bar.update(self.task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        """A step has been logged."""
        line = describe(record)
        if self.live:
            self.bar.update(self.task, last=line)
        else:
            self.console.print(f"step {record['step']}/{self.total_steps}  {line}")
