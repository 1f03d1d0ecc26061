"""Where a number went bad: the same micro-batches once more, eagerly and under hooks, until something is not finite.

A module's output is seen in the forward pass, the gradient of its output and of each adapter weight in the backward
pass, in the order in which they are computed; the first that is not finite is reported, with the largest inputs of its
module. Nothing here runs in a step that goes well, and nothing here may hide the error that it explains.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowlevel.batch.layout import PADDING, PackedBatch
from lowlevel.errors import EVAL_LOSS, NonFiniteError, one_line
from lowlevel.hashing import key32
from lowlevel.kernels import token_logps
from lowlevel.methods import Method
from lowlevel.model.policy import Policy

LARGEST = 8  # input values that are kept
BACKWARD = "backward"


@dataclass(frozen=True)
class Finding:
    """The first thing that was not finite."""

    where: str  # "forward of the policy", "forward of the reference" or BACKWARD
    module: str  # as the model names it, "lm_head", or "the loss"
    what: str
    data_rows: tuple[int, ...] = ()  # of the positions that are not finite
    inputs: tuple[dict[str, Any], ...] = ()  # largest absolute values that went into the module
    weights: tuple[str, ...] = ()  # of the module itself, not finite


@dataclass(frozen=True)
class FailureReport:
    """What failure.json says, and the micro-batch beside it."""

    step: int  # counted from 1, as the log does
    quantity: str  # "loss", "gradient norm" or EVAL_LOSS
    value: float
    data_rows: tuple[int, ...]  # of the whole step, or held out
    attempts: tuple[dict[str, float], ...]  # loss scale, loss and gradient norm, oldest first
    micro_batch: int | None = None
    finding: Finding | None = None
    notes: tuple[str, ...] = ()
    batch: PackedBatch | None = None

    @property
    def evaluates(self) -> bool:
        """Whether it was an evaluation after the step: forward passes without dropout, and nothing to replay."""
        return self.quantity == EVAL_LOSS

    @property
    def sentence(self) -> str:
        """The finding as a part of one line."""
        if self.finding is None:
            return "; ".join(self.notes) or "nothing else was found"
        rows = f", data rows {list(self.finding.data_rows)}" if self.finding.data_rows else ""
        return f"first not finite: {self.finding.what} ({self.finding.where}, micro-batch {self.micro_batch}{rows})"

    def to_json(self, run_dir: Path) -> dict[str, Any]:
        """Plain values; numbers that JSON lacks as text."""
        found = self.finding
        return {
            "step": self.step,
            "quantity": self.quantity,
            "value": str(self.value),
            "data_rows": list(self.data_rows),
            "loss_scale_history": [{k: _plain(v) for k, v in attempt.items()} for attempt in self.attempts],
            "micro_batch": self.micro_batch,
            "micro_batch_rows": list(self.batch.data_rows) if self.batch else [],
            "where": found and found.where,
            "module": found and found.module,
            "what": found and found.what,
            "damaged_rows": list(found.data_rows) if found else [],
            "inputs": [{k: _plain(v) for k, v in value.items()} for value in found.inputs] if found else [],
            "weights_not_finite": list(found.weights) if found else [],
            "notes": list(self.notes),
            "replay": None if self.evaluates else f"lowlevel replay {shlex.quote(str(run_dir))} --step {self.step}",
        }


def examine_error(error: NonFiniteError, policy: Policy, method: Method) -> FailureReport:
    """`examine` with what the loop put into its error. An examination that fails is a note in the report."""
    report = FailureReport(
        error.step + 1,
        error.quantity,
        error.value,
        tuple(row for batch in error.batches for row in batch.data_rows),
        tuple(error.attempts),
    )
    try:
        scale = error.attempts[-1]["loss_scale"] if error.attempts else 1.0
        return examine(report, policy, method, error.batches, seed=error.seed, scale=scale)
    except Exception as problem:  # whatever it is, it is not what stopped the run
        return replace(report, notes=(f"not examined: {type(problem).__name__}: {one_line(problem)}",))


def examine(
    report: FailureReport, policy: Policy, method: Method, batches: Sequence[PackedBatch], *, seed: int, scale: float
) -> FailureReport:
    """Run micro-batches again and say where the first value that is not finite comes from.

    Args:
        report: with the step and what was not finite.
        policy: with the weights before the step, or as evaluated; its gradient is zero afterwards, its weights stay.
        method: as trained.
        batches: of the step, or held out.
        seed: of the run, for dropout.
        scale: loss scale of the attempt that is repeated.
    """
    count, compiled = sum(method.count(batch) for batch in batches), policy.layers.compiled
    policy.layers.use(compiled=False)
    try:
        for number, batch in enumerate(batches):
            policy.flat.grad.zero_()
            moved = batch.to(policy.placement.device)
            factor = None if report.evaluates else scale / count
            found = _first_in(policy, method, moved, factor, key32(seed, report.step - 1))
            if found:
                return replace(report, micro_batch=number, finding=found, batch=batch)
    finally:
        policy.flat.grad.zero_()
        policy.layers.use(compiled=compiled)
    what = "evaluation" if report.evaluates else "step"
    note = f"every module was finite when the {what} was run again eagerly"
    if not (report.evaluates or report.quantity == "loss" or compiled):
        note = "each micro-batch's gradient is finite by itself: their sum or its norm overflows"
    return replace(report, notes=(*report.notes, note))


def _first_in(policy: Policy, method: Method, batch: PackedBatch, factor: float | None, key: int) -> Finding | None:
    """The first finding of a micro-batch; without a factor on the loss as it is evaluated: no dropout, no backward."""
    findings: list[Finding] = []
    with _hooked(policy, batch, findings) as decoded:
        if factor is None:
            policy.dropout.disable()
        else:
            policy.dropout.set_micro_batch(batch.dropout_keys, key)
        loss = method.loss(policy, batch).loss
        if factor is not None and not findings and _finite(loss):
            (loss * factor).backward()
    if not findings and not _finite(loss):
        findings.append(_after_the_decoder(policy, batch, decoded))
    if not findings:
        return None
    first = findings[0]
    if first.where == BACKWARD and not first.inputs:
        return replace(first, inputs=_inputs_of(policy, method, batch, first.module, key))
    return first


@contextmanager
def _hooked(policy: Policy, batch: PackedBatch, findings: list[Finding]) -> Iterator[dict[str, Tensor]]:
    """Hooks on every module and adapter weight; the first finding is the innermost module that ends first."""
    decoder: Any = policy.causal_lm.get_decoder()
    decoded: dict[str, Tensor] = {}
    names = {module: _plain_name(name) for name, module in policy.model.named_modules()}

    def backward(module: str, what: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not findings and not _finite(gradient):
                findings.append(Finding(BACKWARD, module, what, _rows_of(batch, gradient)))

        return hook

    def forward(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        tensor = _tensor(output)
        if findings or tensor is None:
            return
        who = "policy" if torch.is_grad_enabled() else "reference"
        if module is decoder:
            decoded[who] = tensor.detach()
        if not _finite(tensor):
            findings.append(_forward_finding(names[module], who, module, batch, arguments, tensor))
        elif tensor.requires_grad:
            tensor.register_hook(backward(names[module], f"gradient of the output of {names[module]}"))

    handles = [module.register_forward_hook(forward) for module in names]
    for name, view in policy.flat.views.items():
        plain = _plain_name(name)
        handles.append(view.register_hook(backward(plain.removesuffix(".weight"), f"gradient of {plain}")))
    try:
        yield decoded
    finally:
        for handle in handles:
            handle.remove()


def _forward_finding(
    name: str, who: str, module: nn.Module, batch: PackedBatch, arguments: tuple[Any, ...], output: Tensor
) -> Finding:
    weights = [
        f"{name}.{key}"
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and not _finite(parameter)
    ]
    what = f"output of {name}"
    if weights:
        what += ", whose weights are not finite"
    return Finding(
        f"forward of the {who}", name, what, _rows_of(batch, output), _largest(_tensor(arguments)), tuple(weights)
    )


@torch.no_grad()
def _after_the_decoder(policy: Policy, batch: PackedBatch, decoded: dict[str, Tensor]) -> Finding:
    """Every module was finite and the loss is not: the LM head, which no module runs, or the loss itself."""
    for who, output in decoded.items():
        hidden = output.flatten(0, 1).index_select(0, batch.scored_positions)
        sums = batch.sequence_sums(token_logps(hidden, policy.lm_head_weight, batch.scored_targets))
        bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        if bad:
            examples = len(batch.real)
            rows = tuple(
                dict.fromkeys(batch.data_rows[i % examples] for i in bad if i % examples < len(batch.data_rows))
            )
            return Finding(
                f"forward of the {who}", "lm_head", "log-probabilities of the targets (LM head)", rows, _largest(hidden)
            )
    return Finding("forward of the policy", "the loss", "the loss alone: all modules and log-probabilities are finite")


def _inputs_of(policy: Policy, method: Method, batch: PackedBatch, module: str, key: int) -> tuple[dict[str, Any], ...]:
    """Largest inputs of a module in the policy's forward pass: the one with gradients, the reference's has none."""
    found: list[tuple[dict[str, Any], ...]] = []
    named = {_plain_name(name): m for name, m in policy.model.named_modules()}
    if module not in named:
        return ()

    def record(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        if torch.is_grad_enabled():
            found.append(_largest(_tensor(inputs)))

    handle = named[module].register_forward_hook(record)
    policy.dropout.set_micro_batch(batch.dropout_keys, key)
    try:
        method.loss(policy, batch)
    finally:
        handle.remove()
    return found[0] if found else ()


def _largest(tensor: Tensor | None) -> tuple[dict[str, Any], ...]:
    """The largest absolute values of a tensor with their places, those that are not finite first."""
    if tensor is None or not tensor.is_floating_point() or not tensor.numel():
        return ()
    flat = tensor.detach().flatten().float()
    order = flat.abs().nan_to_num(nan=torch.inf).topk(min(LARGEST, flat.numel())).indices.cpu()
    places = zip(*(axis.tolist() for axis in torch.unravel_index(order, tensor.shape)), strict=True)
    return tuple(
        {"value": value, "at": list(place)} for value, place in zip(flat.cpu()[order].tolist(), places, strict=True)
    )


def _rows_of(batch: PackedBatch, tensor: Tensor) -> tuple[int, ...]:
    """Data rows of the positions of a (rows, T, features) tensor that hold a value that is not finite."""
    if tensor.dim() != 3 or tensor.shape[:2] != batch.input_ids.shape:
        return ()
    segments, examples = batch.segment_ids.cpu(), len(batch.real)
    owner: dict[tuple[int, int], int] = {}  # (row, segment) -> data row
    width = segments.shape[1]
    for position, sequence in zip(batch.scored_positions.tolist(), batch.sequence_ids.tolist(), strict=True):
        if sequence < len(batch.lengths) and sequence % examples < len(batch.data_rows):
            place = (position // width, int(segments[position // width, position % width]))
            owner[place] = batch.data_rows[sequence % examples]
    bad = (~torch.isfinite(tensor)).any(-1).cpu() & (segments != PADDING)
    places = {(row, int(segments[row, t])) for row, t in bad.nonzero().tolist()}
    return tuple(sorted({owner[place] for place in places if place in owner}))


def _finite(tensor: Tensor) -> bool:
    """Detached: what autograd saved here would not be saved again when a layer is recomputed."""
    return bool(torch.isfinite(tensor.detach()).all())


def _tensor(value: Any) -> Tensor | None:
    """The tensor that a module took or gave, or the first of several."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("model.") or "model"


def _plain(value: Any) -> Any:
    return value if not isinstance(value, float) or abs(value) < float("inf") else str(value)
