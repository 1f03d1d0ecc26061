"""`lowlevel doctor`: checks of a machine before a run, one line per check; then one step of the demo's base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowlevel.durable import write_given_json
from lowlevel.errors import LowlevelError
from lowlevel.preflight import software
from lowlevel.preflight.finding import Finding, look

Checks = Sequence[tuple[str, Callable[[], Finding]]]
STYLES = {"ok": "green", "note": "yellow", "FAIL": "bold red"}
SOFTWARE: Checks = (("python", software.python), ("libraries", software.libraries))


class PreflightError(LowlevelError):
    """A run would fail on this machine."""

    exit_code = 1


def run_doctor(out: Path, json_file: Path | None, console: Console, silence: Callable[[], object]) -> list[Finding]:
    """Run all checks, print a line as each one ends, and write the findings as JSON.

    `silence` is called before the libraries are imported: it keeps their advice out of the table.

    Raises PreflightError if a check failed.
    """
    findings = [_shown(name, check, console) for name, check in SOFTWARE]
    absent = software.missing()
    if not absent:
        silence()
        findings += [_shown(name, check, console) for name, check in machine_checks(out)]
        console.print("\none step of the built-in base on built-in rows, its adapter at its start")
        findings += [_shown(name, check, console) for name, check in step_checks()]
    failed = [one for one in findings if one.verdict == "FAIL"]
    if json_file:
        write_given_json(json_file, {"ok": not failed, "findings": [asdict(one) for one in findings]})
    if failed:
        rest = f"; nothing else can be looked at without {', '.join(absent)}" if absent else ""
        raise PreflightError(f"{len(failed)} of {len(findings)} checks failed: {_names(failed)}{rest}")
    notes = [one for one in findings if one.verdict == "note"]
    aside = f"; {len(notes)} with a note: {_names(notes)}" if notes else ""
    console.print(f"\na run can start here: {len(findings)} checks{aside}")
    return findings


def machine_checks(out: Path) -> Checks:
    """Checks that load no weights. Their imports are here, because torch takes seconds and may be missing."""
    from lowlevel.preflight import device, numerics

    return (
        ("device", device.device),
        ("precision", device.precision),
        ("attention", device.attention),
        ("execution", device.execution),
        ("compiler", device.compiler),
        ("4-bit weights", numerics.four_bit),
        ("Triton kernels", numerics.triton_kernels),
        ("optimizer", numerics.optimizer),
        ("run folder", partial(device.run_folder, out)),
        ("hub cache", device.hub),
    )


def step_checks() -> Checks:
    """One step of each method."""
    from lowlevel.preflight.numerics import one_step

    return ("sft step", partial(one_step, "sft")), ("dpo step", partial(one_step, "dpo"))


def _shown(name: str, check: Callable[[], Finding], console: Console) -> Finding:
    """The finding, printed at once: if a check ends the process, it is the one after the last line."""
    found = look(name, check)
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in (14, 4):
        table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    advice = Text(f"\n-> {found.advice}", style="bold") if found.advice else Text()
    table.add_row(Text(name), Text(found.verdict, style=STYLES[found.verdict]), Text(found.found) + advice)
    console.print(table)
    return found


def _names(findings: Sequence[Finding]) -> str:
    return ", ".join(one.what for one in findings)
