"""Finds the first NaN or infinite value after a loss or gradient was not finite, for the report of failure.py.

The micro-batches run again, eagerly and with hooks on the output of each module, its gradient, and the gradient of each
adapter weight. The first that is not finite is reported, with the largest inputs of its module. Nothing here runs in a
normal step, and an error here never hides the error that it explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowlevel.batch.layout import PADDING, PackedBatch
from lowlevel.errors import NonFiniteError, one_line
from lowlevel.hashing import key32
from lowlevel.methods import Method
from lowlevel.model.policy import Policy
from lowlevel.running.failure import BACKWARD, FailureReport, Finding, write_failure

LARGEST = 8  # input values kept in the report


def examine_error(error: NonFiniteError, policy: Policy, method: Method) -> FailureReport:
    """Run the batches of the error again and report the module of the first value that is not finite.

    The policy must have the weights before the step, or as evaluated. They do not change; its gradient becomes zero. If
    the examination fails, the report says so.
    """
    data_rows = tuple(row for batch in error.batches for row in batch.data_rows)
    report = FailureReport(error.step + 1, error.quantity, error.value, data_rows, tuple(error.attempts))
    try:
        return _examine(report, policy, method, error)
    except Exception as problem:  # it must not hide the error that stopped the run
        return replace(report, notes=(f"not examined: {type(problem).__name__}: {one_line(problem)}",))


def _examine(report: FailureReport, policy: Policy, method: Method, error: NonFiniteError) -> FailureReport:
    batches, compiled = error.batches, policy.layers.compiled
    scale = error.attempts[-1]["loss_scale"] if error.attempts else 1.0
    count = sum(method.count(batch) for batch in batches)
    policy.layers.use(compiled=False)
    try:
        for number, batch in enumerate(batches):
            policy.flat.grad.zero_()
            moved = batch.to(policy.placement.device)
            factor = None if report.evaluates else scale / count
            found = _first_in(policy, method, moved, factor, key32(error.seed, error.step))
            if found:
                return replace(report, micro_batch=number, finding=found, batch=batch)
    finally:
        policy.flat.grad.zero_()
        policy.layers.use(compiled=compiled)
    what = "evaluation" if report.evaluates else "step"
    note = f"every module was finite when the {what} was run again eagerly"
    if not (report.evaluates or report.quantity == "loss" or compiled):
        note = "the gradient of each micro-batch is finite: their sum or its norm overflows"
    return replace(report, notes=(note,))


def _first_in(policy: Policy, method: Method, batch: PackedBatch, factor: float | None, key: int) -> Finding | None:
    """The first finding of a micro-batch. `factor` multiplies the loss; None evaluates: no dropout, no backward."""
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
    """Hooks on every module and adapter weight; the first finding is the innermost module that ends first.

    Yields the decoder's output of policy and reference, once computed.
    """
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

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(forward))
        for name, view in policy.flat.views.items():
            plain = _plain_name(name)
            hooks.enter_context(view.register_hook(backward(plain.removesuffix(".weight"), f"gradient of {plain}")))
        yield decoded


def _forward_finding(
    name: str, who: str, module: nn.Module, batch: PackedBatch, arguments: tuple[Any, ...], output: Tensor
) -> Finding:
    own = module.named_parameters(recurse=False)
    weights = tuple(f"{name}.{key}" for key, p in own if p.is_floating_point() and not _finite(p))
    what = f"output of {name}, whose weights are not finite" if weights else f"output of {name}"
    rows, inputs = _rows_of(batch, output), _largest(_tensor(arguments))
    return Finding(f"forward of the {who}", name, what, rows, inputs, weights)


@torch.no_grad()
def _after_the_decoder(policy: Policy, batch: PackedBatch, decoded: dict[str, Tensor]) -> Finding:
    """Every module was finite and the loss is not: the LM head (computed outside its module) or the loss itself."""
    for who, output in decoded.items():
        hidden = output.flatten(0, 1).index_select(0, batch.scored_positions)
        sums = batch.sequence_sums(policy.scores(hidden, batch.scored_targets)[0])
        bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        if bad:
            examples = [i % len(batch.real) for i in bad]
            rows = tuple(dict.fromkeys(batch.data_rows[i] for i in examples if i < len(batch.data_rows)))
            head, what = "lm_head", "log-probabilities of the targets (LM head)"
            if policy.reward_head is not None:
                head, what = "score", "rewards (reward head)"
            return Finding(f"forward of the {who}", head, what, rows, _largest(hidden))
    return Finding("forward of the policy", "the loss", "the loss: all modules and log-probabilities are finite")


def _inputs_of(policy: Policy, method: Method, batch: PackedBatch, module: str, key: int) -> tuple[dict[str, Any], ...]:
    """Largest inputs of a module in the policy's forward pass, which is the one with gradients enabled."""
    found: list[tuple[dict[str, Any], ...]] = []
    named = {_plain_name(name): m for name, m in policy.model.named_modules()}
    if module not in named:
        return ()

    def record(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        if torch.is_grad_enabled():
            found.append(_largest(_tensor(inputs)))

    policy.dropout.set_micro_batch(batch.dropout_keys, key)
    with named[module].register_forward_hook(record):
        method.loss(policy, batch)
    return found[0] if found else ()


def _largest(tensor: Tensor | None) -> tuple[dict[str, Any], ...]:
    """The largest absolute values of a tensor and their indices; values that are not finite come first."""
    if tensor is None or not tensor.is_floating_point() or not tensor.numel():
        return ()
    flat = tensor.detach().flatten().float()
    order = flat.abs().nan_to_num(nan=torch.inf).topk(min(LARGEST, flat.numel())).indices.cpu()
    places = torch.stack(torch.unravel_index(order, tensor.shape), -1).tolist()
    values = flat.cpu()[order].tolist()
    return tuple({"value": value, "at": place} for value, place in zip(values, places, strict=True))


def _rows_of(batch: PackedBatch, tensor: Tensor) -> tuple[int, ...]:
    """Data rows whose positions in a (rows, T, features) tensor hold a value that is not finite."""
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
    """Detached, because a tensor that autograd saves here would be missing when a layer is recomputed."""
    return bool(torch.isfinite(tensor.detach()).all())


def _tensor(value: Any) -> Tensor | None:
    """The first tensor of a module's arguments or output."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("model.") or "model"


def explained(error: NonFiniteError, policy: Policy, method: Method, run_dir: Path) -> NonFiniteError:
    """The error with the finding and the path of the report at its end. Always returns an error to raise."""
    report = examine_error(error, policy, method)
    try:
        end = f"see {write_failure(report, run_dir)}"
    except Exception as problem:  # a full disk must not hide the error that stopped the run
        end = f"no report written ({one_line(problem)})"
    return NonFiniteError(f"{error}; {report.sentence}; {end}")


@contextmanager
def explaining(policy: Policy, method: Method, run_dir: Path) -> Iterator[None]:
    """Replace a NonFiniteError of the block by its explained form, and write `failure/`."""
    try:
        yield
    except NonFiniteError as error:
        raise explained(error, policy, method, run_dir) from None
