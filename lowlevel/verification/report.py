"""Verifying the newest weights of a run folder, or the start of a configuration's run: all groups of checks."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowlevel.config.schema import RunConfig
from lowlevel.determinism import deterministic_mode
from lowlevel.errors import LowlevelError
from lowlevel.heartbeat import working
from lowlevel.model.adapters import adapter_parameters, adapter_sha256, read_adapter_weights
from lowlevel.model.base import base_sha256
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.model.policy import PARENT, Policy
from lowlevel.running.assembly import Inputs, build_method, build_run_policy, check_start, choose_execution
from lowlevel.running.reopening import Reopened, step_examples
from lowlevel.verification.accounting import accounting_checks, invariance_checks
from lowlevel.verification.evidence import gather
from lowlevel.verification.gradients import gradient_checks
from lowlevel.verification.loss import loss_checks
from lowlevel.verification.masking import masking_checks
from lowlevel.verification.reference import frozen_checks, reference_checks
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
        with kept_weights(policy):
            if without_effect(policy):
                fill_b(policy)
            with without_dropout(policy):
                work.what = "verifying: checking the masks"
                checks = masking_checks(subject)
                work.what = "verifying: running the model, also in float64"
                evidence = gather(subject)
                checks += loss_checks(subject, evidence)
                work.what = "verifying: checking the gradient"
                checks += gradient_checks(subject, evidence)
                checks += accounting_checks(subject, evidence)
            work.what = "verifying: comparing layouts and modes of execution"
            checks += invariance_checks(subject, evidence)
        work.what = "verifying: checking the reference"
        checks += reference_checks(subject)
        return checks + frozen_checks(subject, names, before, (base, base_sha256(policy.model)))


class VerificationError(LowlevelError):
    """A check failed."""

    exit_code = 1


@dataclass(frozen=True)
class Report:
    """The checks of one step; `print(report)` shows their table."""

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
            f"verify {self.method}: loss {self.loss}, step {self.step}, {len(self.data_rows)} examples, "
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

    def __str__(self) -> str:
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


EXACT_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class Opened:
    """Configuration and inputs, and the weights to verify."""

    config: RunConfig
    inputs: Inputs
    weights: str
    run: Reopened | None = None  # None: the start of a run
    adapter: Path | None = None  # of a run: the folder of these weights; None: its start


def open_start(config: RunConfig, scratch: Path) -> Opened:
    """The start of a configuration's run; a merged base is written to `scratch`. Raises as training would."""
    config, inputs = check_start(config, scratch)
    weights = "the run's start (B = 0); checks that need an adapter with an effect use a random B"
    if config.lora.init_lora_weights == "loftq":
        weights = "the run's start (from the quantisation error)"
    return Opened(config, inputs, weights)


def open_run(run: Reopened) -> Opened:
    """A run with its newest adapter. Raises for changed rows or another loss, and for damaged weights."""
    run.method()  # refuses another loss before anything is loaded
    adapter = run.folder.newest_adapter(run.note)
    if adapter is None:
        line = "the run's start: it has not finished and saved no checkpoint yet"
    elif adapter == run.folder.adapter:
        line = "final adapter"
    else:
        line = f"{adapter.name}, the newest checkpoint: the run has not finished"
    return Opened(run.config, run.inputs(adapter), line, run, adapter)


def verify_run(opened: Reopened | Opened, *, step: int = 1, exact_parameters: int = EXACT_PARAMETERS) -> Report:
    """Recompute an optimizer step of a run, and compare; failed checks are in the report.

    Args:
        opened: a run from `lowlevel.running.reopening.reopen` (its newest weights), or from `open_start` (its start).
        step: optimizer step whose examples are taken, counted from 1.
        exact_parameters: a base of up to this many weights is also run in float64, on the CPU.

    Raises:
        ConfigError: no such step, or a loss that is not registered or fails in float64.
        DataError: the data is not what the run trained on.
        CheckpointError: damaged weights, or a base, adapter or loss that is not the run's.
    """
    opened = open_run(opened) if isinstance(opened, Reopened) else opened
    examples = step_examples(opened.config, opened.inputs.data, step)
    with deterministic_mode(opened.config.train.deterministic):
        subject = make_subject(opened, examples, step - 1, exact_parameters)
        placement, moving = subject.policy.placement, subject.policy.moving
        equal = opened.adapter is not None and moving is not None and without_effect(subject.policy)
        return Report(
            method=subject.config.method,
            loss=subject.spec.name,
            step=step,
            data_rows=[example.row for example in subject.examples],
            weights=opened.weights + "; its moving reference equals it, so checks use a random B" * equal,
            device=str(placement.device),
            precision=placement.precision,
            execution=subject.mode,
            checks=run_checks(subject),
        )


def make_subject(opened: Opened, examples: Sequence[Any], step: int, exact_parameters: int) -> Subject:
    """Load the model; `step` is counted from 0, the rest as in `verify_run`."""
    config, inputs = opened.config, opened.inputs
    policy = build_run_policy(config, inputs)
    hashes = _hashes(opened.run, policy) if opened.run else {}
    if opened.run:
        opened.run.load_reference(policy, opened.adapter)
    dequantize_as_set(policy, config.train.dequantize_once)
    method = build_method(config, inputs.attention)
    if method.spec.mixes_pairs:
        rows = set(method.micro_batches(examples)[0].data_rows)  # one micro-batch: the float64 formulas mix all pairs
        examples = [example for example in examples if example.row in rows]
    mode = choose_execution(config, inputs)
    return Subject(config, inputs.tokenizer, policy, method, tuple(examples), step, mode, hashes, exact_parameters)


def _hashes(run: Reopened, policy: Policy) -> dict[str, tuple[str, str]]:
    """Hashes of base and frozen adapter: as found, and as in the manifest. Other commands raise if they differ."""
    base = run.base_hashes(policy)
    hashes = {"base": base} if base else {}
    if run.parent:
        saved = read_adapter_weights(run.parent)
        own = adapter_parameters(policy.model, PARENT)
        same = all(bool((own[name].cpu() == tensor).all()) for name, tensor in saved.items())
        found = adapter_sha256(run.parent)
        hashes["frozen adapter"] = (found if same else "loaded otherwise", run.manifest["parent_adapter"])
    return hashes
