"""`lowlevel verify`: one step of a run, recomputed; a table of errors and bounds, and exit code 1 where one fails."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lowlevel.determinism import deterministic_mode
from lowlevel.durable import write_given_json
from lowlevel.errors import ConfigError, LowlevelError
from lowlevel.running.progress import lines_to
from lowlevel.running.reopening import step_examples
from lowlevel.running.run_folder import RunFolder
from lowlevel.verification.check import Check
from lowlevel.verification.opening import Opened, make_subject, open_file, open_folder
from lowlevel.verification.report import as_json, print_checks, run_checks
from lowlevel.verification.subject import Subject


class VerificationError(LowlevelError):
    """A check failed."""

    exit_code = 1


def verify_run(
    path: Path,
    console: Console,
    *,
    exact_parameters: int,
    batch: int = 1,
    overrides: Mapping[str, str] | None = None,
    json_file: Path | None = None,
) -> list[Check]:
    """Verify one step of a run folder or run file, and print and write the result.

    Args:
        path: a run folder (its newest weights), or a run file (the start of the run).
        console: where the table goes.
        exact_parameters: bases of up to so many weights are also run in float64, on the CPU.
        batch: optimizer step whose micro-batches are taken, counted from 1.
        overrides: flags over a run file, "section.key" -> text.
        json_file: where the result is written; None: verify.json in the run folder, nothing for a run file.

    Raises:
        VerificationError: a check failed.
        ConfigError: neither folder nor file, or no such step.
        DataError: the data is not what the run trained on.
        CheckpointError: damaged weights, or a base or adapter that is not the run's.
    """
    if json_file and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: no such folder")
    folder = RunFolder(path) if path.is_dir() else None
    with tempfile.TemporaryDirectory() as scratch:
        note = lines_to(console)
        opened = open_folder(folder, note) if folder else open_file(path, overrides or {}, Path(scratch))
        examples = step_examples(opened.config, opened.inputs.data, batch, "--step")
        with deterministic_mode(opened.config.train.deterministic):
            subject = make_subject(opened, examples, batch - 1, exact_parameters)
            _announce(path, opened, batch, subject, console)
            checks = run_checks(subject)
    print_checks(checks, console)
    target = json_file or (folder.path / "verify.json" if folder else None)
    if target:
        write_given_json(target, _document(subject, opened.weights, batch, checks))
    failed = [one for one in checks if not one.ok]
    if failed:
        names = "; ".join(f"{one.group}: {one.name} {one.measured:.3g} > {one.bound:.3g}" for one in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise VerificationError(f"{len(failed)} of {len(checks)} checks failed: {names}{more}")
    console.print(f"all {len(checks)} checks hold")
    return checks


def _announce(path: Path, opened: Opened, batch: int, subject: Subject, console: Console) -> None:
    placement = subject.policy.placement
    console.print(
        f"verify {path}: {opened.config.method}, step {batch}, {len(subject.examples)} examples, "
        f"{placement.precision} on {placement.device}, {subject.mode}\nweights: {opened.weights}",
        markup=False,
    )


def _document(subject: Subject, weights: str, batch: int, checks: list[Check]) -> dict[str, Any]:
    placement = subject.policy.placement
    return {
        "method": subject.config.method,
        "step": batch,
        "data_rows": [example.row for example in subject.examples],
        "weights": weights,
        "device": str(placement.device),
        "precision": placement.precision,
        "execution": subject.mode,
        "ok": all(one.ok for one in checks),
        "checks": as_json(checks),
    }
