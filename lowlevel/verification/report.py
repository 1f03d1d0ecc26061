"""All groups of checks, and their report."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowlevel.errors import LowlevelError, how_many
from lowlevel.heartbeat import working
from lowlevel.model.base import base_sha256
from lowlevel.verification.accounting import accounting_checks
from lowlevel.verification.evidence import gather
from lowlevel.verification.gradients import gradient_checks
from lowlevel.verification.invariances import invariance_checks
from lowlevel.verification.loss import loss_checks
from lowlevel.verification.masking import masking_checks
from lowlevel.verification.reference import frozen_checks, reference_checks
from lowlevel.verification.sampled import sampled_checks
from lowlevel.verification.subject import Check, Subject, fill_b, kept_weights, without_dropout, without_effect


def run_checks(subject: Subject) -> list[Check]:
    """Every check on one step. The policy is left as it was.

    If the trained adapter has no effect, most gradients and all margins are 0 and prove nothing. So B gets random
    numbers, except for the reference's checks.
    """
    policy = subject.policy
    names, before = policy.trainable_names(), policy.flat.weights.detach().clone()
    with working("verifying") as work:
        base = base_sha256(policy.model)
        by_token = subject.config.method in ("grpo", "rloo", "ppo")
        with kept_weights(policy):
            if without_effect(policy):  # a KL term's gradient is about a log-ratio: larger than rounding
                fill_b(policy, size=0.2 if by_token else 0.05)
            if by_token:
                work.what = "verifying: sampled completions, also in float64"
                checks = sampled_checks(subject)
            else:
                with without_dropout(policy):
                    work.what = "verifying: checking the masks"
                    checks = [] if subject.config.sampled else masking_checks(subject)  # sampled: not in the data
                    work.what = "verifying: running the model, also in float64"
                    evidence = gather(subject)
                    checks += loss_checks(subject, evidence)
                    work.what = "verifying: checking the gradient"
                    checks += gradient_checks(subject, evidence)
                    checks += accounting_checks(subject, evidence)
                work.what = "verifying: comparing layouts and modes of execution"
                checks += invariance_checks(subject, evidence)
        if not by_token:
            work.what = "verifying: checking the reference"
            checks += reference_checks(subject)
        return checks + frozen_checks(subject, names, before, (base, base_sha256(policy.model)))


class VerificationError(LowlevelError):
    """A check failed."""

    exit_code = 1


@dataclass(frozen=True)
class Report:
    """The checks of one step; as text, their table."""

    method: str
    loss: str  # its name
    step: int  # counted from 1
    data_rows: list[int]
    weights: str
    device: str
    precision: str
    execution: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(one.ok for one in self.checks)

    @property
    def heading(self) -> str:
        """What is verified, in two lines."""
        return (
            f"verify {self.method}: loss {self.loss}, step {self.step}, {how_many(len(self.data_rows), 'examples')}, "
            f"{self.precision} on {self.device}, {self.execution}\nweights: {self.weights}"
        )

    def check(self) -> None:
        """Raise VerificationError, with the first three that failed, if a check failed."""
        failed = [one for one in self.checks if not one.ok]
        if failed:
            names = "; ".join(f"{one.group}: {one.name} {one.measured:.3g} > {one.bound:.3g}" for one in failed[:3])
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise VerificationError(f"{len(failed)} of {len(self.checks)} checks failed: {names}{more}")

    def as_json(self) -> dict[str, Any]:
        """For verify.json; a measurement or bound that is not finite is null."""
        document = {**asdict(self), "ok": self.ok}
        for one in document["checks"]:
            one |= {key: one[key] if math.isfinite(one[key]) else None for key in ("measured", "bound")}
        return document

    def __repr__(self) -> str:
        out = io.StringIO()
        print_checks(self.checks, Console(file=out, width=120, force_terminal=False, force_jupyter=False))
        return f"{self.heading}\n{out.getvalue()}"


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """One line a check. Its note is a last column if there is room; a narrow console shows those of failures below."""
    wide = console.width >= 120
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("check", no_wrap=True, overflow="ellipsis", max_width=46)
    for name in ("measured", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if wide:
        table.add_column("note", overflow="fold")
    for group, of_group in itertools.groupby(checks, lambda one: one.group):
        table.add_row(Text(group, style="bold"))
        for one in of_group:
            verdict = Text("ok", style="green") if one.ok else Text("FAIL", style="bold red")
            cells: list[Any] = [Text(f"  {one.name}"), number(one.measured), number(one.bound), verdict]
            table.add_row(*cells, *([Text(one.note, style="dim")] * wide))
    console.print(table)
    for one in checks:
        if not (wide or one.ok) and one.note:
            console.print(f"{one.name}: {one.note}", markup=False)


def number(value: float) -> str:
    """Whole numbers as they are, others with three digits."""
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) and value < 1e6 else f"{value:.2e}"
