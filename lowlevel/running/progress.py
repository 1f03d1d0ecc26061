"""Console output of a run: lines, and in a terminal a live progress bar below them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lowlevel.heartbeat import Heartbeat, heartbeat, paused, spoke, working

EQUAL_REWARDS = "frac_reward_zero_std"  # share of prompts whose completions all have the same reward
LINE_KEYS = {
    "loss": "loss {:z.4f}",
    "eval_loss": "eval_loss {:z.4f}",
    "eval_perplexity": "eval_perplexity {:.2f}",
    "reward": "reward {:z.3f}",
    "eval_reward": "eval_reward {:z.3f}",
    "completions/mean_length": "{:.0f} tokens a completion",
    EQUAL_REWARDS: "equal rewards in {:.0%} of prompts",
    "rewards/accuracies": "accuracy {:.3f}",
    "eval_rewards/accuracies": "eval_accuracy {:.3f}",
    "rewards/margins": "margin {:z.4f}",
    "grad_norm": "grad_norm {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_allocated_gib": "{:.2f} GiB",
    "skipped_steps": "{} skipped",
}
HIDE_AT_ZERO = (EQUAL_REWARDS, "peak_allocated_gib", "skipped_steps")


class PipedConsole(Console):
    """A console whose reader may close the pipe: rich would exit with an error code."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError."""
        raise BrokenPipeError


def make_console() -> Console:
    """A console on standard output; outside a terminal it does not wrap lines at 80 columns."""
    terminal = sys.stdout.isatty()
    width = None if terminal else 140
    return PipedConsole(  # text in a notebook too
        highlight=False,
        emoji=False,  # "module:boom" stays a name
        soft_wrap=not terminal,
        width=width,
        force_terminal=terminal,
        force_jupyter=False,
    )


def quiet_libraries() -> None:
    """Switch off progress bars and warnings of libraries; their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without ipywidgets
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 advises to download a kernel from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 renamed gradient_checkpointing_enable; PEFT 0.21 uses the name that 5.17 requires.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # it returns a view, which nothing changes
    warnings.filterwarnings("ignore", message="\\s*Online softmax is disabled")  # torch 2.11's compiler, of a reduction


def lines_to(console: Console) -> Callable[[str], None]:
    """A function that prints a line without rich's markup, which a path may contain."""
    return lambda line: console.print(line, markup=False)


def speaking(console: Console, name: str) -> AbstractContextManager[Heartbeat]:
    """Lines of long work on a console; none on a quiet console, or inside another such block."""
    return heartbeat(lines_to(console), name, on=not console.quiet)


def describe(record: dict[str, Any], method: str | None = None) -> str:
    """One line for a logged record. Equal rewards matter where rewards are compared, so not in ppo."""
    shown = [
        form.format(record[key])
        for key, form in LINE_KEYS.items()
        if key in record and (record[key] or key not in HIDE_AT_ZERO) and (key != EQUAL_REWARDS or method != "ppo")
    ]
    return "  ".join(shown)


class TrainingProgress:
    """A line for each logged record and, in a terminal, a bar over optimizer steps with the remaining time."""

    def __init__(self, console: Console, name: str, total_steps: int, start: int) -> None:
        self.console, self.name, self.total_steps = console, name, total_steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
        self.task = self.bar.add_task(name, total=total_steps, completed=start)
        self._work, self._opened = working("training", total_steps, "steps", first=start), ExitStack()

    def __enter__(self) -> TrainingProgress:
        self.work = self._opened.enter_context(self._work)
        if self.console.is_terminal:
            self._opened.enter_context(paused())
            self._opened.enter_context(self.bar)
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def step(self, step: int) -> None:
        """Show that `step` steps are done."""
        self.bar.update(self.task, completed=step)
        self.work.done = step

    def record(self, record: dict[str, Any]) -> None:
        """Print a logged record, in a terminal above the bar."""
        self.console.print(f"step {record['step']}/{self.total_steps}  {describe(record, self.name)}")
        spoke()
