"""All groups in turn, and their table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowlevel.model.base import base_sha256
from lowlevel.verification.accounting import accounting_checks
from lowlevel.verification.check import Check
from lowlevel.verification.evidence import gather
from lowlevel.verification.gradients import gradient_checks
from lowlevel.verification.invariances import invariance_checks
from lowlevel.verification.loss import loss_checks
from lowlevel.verification.masking import masking_checks
from lowlevel.verification.reference import frozen_checks, reference_checks
from lowlevel.verification.subject import Subject, fill_b, has_effect, kept_weights, without_dropout


def run_checks(subject: Subject) -> list[Check]:
    """Every check on one step. The policy is left as it was.

    An adapter at its start has B = 0: then most gradients and all margins are 0 and would prove nothing, so B is filled
    with random numbers for all groups but the reference's.
    """
    policy = subject.policy
    names, before = policy.trainable_names(), policy.flat.weights.detach().clone()
    base = base_sha256(policy.model)
    checks: list[Check] = []
    with kept_weights(policy):
        if not has_effect(policy):
            fill_b(policy)
        with without_dropout(policy):
            checks += masking_checks(subject)
            evidence = gather(subject)
            checks += loss_checks(subject, evidence)
            checks += gradient_checks(subject, evidence)
            checks += accounting_checks(subject, evidence)
        checks += invariance_checks(subject, evidence)
    checks += reference_checks(subject)
    return checks + frozen_checks(subject, names, before, (base, base_sha256(policy.model)))


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """One line a check; notes stand beside them where there is room, and under failures always."""
    wide = console.width >= 120
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("check", no_wrap=True, overflow="ellipsis", max_width=46)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("bound", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if wide:
        table.add_column("what", overflow="fold")
    group = ""
    for one in checks:
        if one.group != group:
            group = one.group
            table.add_row(Text(group, style="bold"), *([""] * (4 if wide else 3)))
        verdict = Text("ok", style="green") if one.ok else Text("FAIL", style="bold red")
        cells: list[Any] = [Text(f"  {one.name}"), number(one.measured), number(one.bound), verdict]
        table.add_row(*cells, *([Text(one.note, style="dim")] * wide))
    console.print(table)


def number(value: float) -> str:
    """0 and counts as they are, the rest with three digits."""
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) and value < 1e6 else f"{value:.2e}"


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """For verify.json; a measurement that is not finite is null."""
    return [{**asdict(one), "measured": one.measured if math.isfinite(one.measured) else None} for one in checks]
