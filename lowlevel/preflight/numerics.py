"""Small computations with known results (4-bit weights, the Triton kernels, one optimizer update); and one step of the
built-in base on built-in rows, in eager mode and in this machine's default mode.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lowlevel.config.file import config_from_tables
from lowlevel.config.schema import RunConfig, TrainConfig
from lowlevel.kernels import dequantize, vocabulary
from lowlevel.kernels.dequantize import Quantised, dequantize_reference
from lowlevel.kernels.host_rows import host_rows, host_rows_reference
from lowlevel.methods.choice import build_method
from lowlevel.model.placement import Placement, choose_placement
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.optim.train_state import StepResult
from lowlevel.preflight.finding import Finding, fail, note, ok
from lowlevel.running.assembly import build_run_policy, check_inputs, choose_execution
from lowlevel.running.observer import MARGINS, all_ties
from lowlevel.verification.subject import BOUNDS as GRADIENT_BOUNDS
from lowlevel.verification.subject import Subject, relative

NF4_ERROR = 0.092  # |W - NF4(W)| / |W| of Gaussian weights in blocks of 64 (tests/preflight recompute it)
NF4_TOLERANCE = 0.002
WORDS = 4097  # one more than a block of the kernel
SLOWER = "the same numbers from slower steps; model.embeddings_on_host needs Triton"
PAGED_SIZE = 2**17  # weights: bitsandbytes 0.50 pages states from 100,000 weights on
UPDATE_BOUND = 1e-6  # for an update of 1e-3 on weights up to 1, in fp32


def four_bit() -> Finding:
    """Quantise and dequantise on the device; compare the error with the known one, the numbers with plain torch."""
    place = choose_placement("auto")
    error, equal = _four_bit(256, 512, place)
    if abs(error - NF4_ERROR) > NF4_TOLERANCE or not equal:
        differs = "" if equal else ", and differs from its codes and constants"
        return fail(
            f"NF4 changes Gaussian weights by {error:.1%} of their norm, not by {NF4_ERROR:.1%}{differs}",
            "bitsandbytes is broken on this device: reinstall it, or set model.load_in_4bit = false",
        )
    found = f"NF4 changes Gaussian weights by {error:.1%} of their norm, as expected"
    ragged, equal = _four_bit(64, 96, place)
    if not equal:
        return note(
            f"{found}; row lengths that are not a multiple of 64 are read wrongly here (error {ragged:.1%})",
            "a base with such rows is refused: set model.load_in_4bit = false for it",
        )
    return ok(found)


def _four_bit(rows: int, columns: int, placement: Placement) -> tuple[float, bool]:
    """Relative error of random weights after NF4, and whether bitsandbytes dequantises them as plain torch does.

    Up to rounding: with AVX-512 some fp16 values differ by a unit. Constants of a wrong block differ by 20 % or more.
    """
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    values = values.to(placement.device, placement.dtype)
    packed, state = _in_nf4(values)
    found = bnb.functional.dequantize_4bit(packed, state)
    twin = dequantize_reference(Quantised.of(packed, state), placement.dtype)
    return relative(found, values), relative(found, twin) <= ROUNDED[placement.precision]


def triton_kernels() -> Finding:
    """Compare each kernel with its torch twin, if a run would use it."""
    placement = choose_placement("auto")
    if placement.device.type != "cuda":
        return ok("torch twins: the Triton kernels are for a GPU")
    return compare_kernels(placement)


def compare_kernels(placement: Placement) -> Finding:
    """Whether each kernel is usable, and gives the numbers of its twin."""
    device, dtype = placement.device, placement.dtype
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        softmax, weights = vocabulary.usable(device, dtype, WORDS), dequantize.usable(device, dtype)
    apart = (_softmax_apart(placement) if softmax else {}) | (_weights_apart(placement) if weights else {})
    bounds = {name: bound[placement.precision] for name, bound in KERNELS.items()}
    wrong = [f"{name} is off by {one:.1e} (bound {bounds[name]:g})" for name, one in apart.items()
             if not one <= bounds[name]]  # fmt: skip
    if wrong:
        return fail("; ".join(wrong), "these numbers would be wrong: uninstall triton, and runs use torch instead")
    if twins := [name for name in KERNELS if name not in apart]:
        reason = str(caught[0].message) if caught else "Triton was refused before"
        return note(f"torch twins for {', '.join(twins)}: {reason}", SLOWER)
    return ok("as their torch twins: " + ", ".join(f"{name} ({one:.0e} apart)" for name, one in apart.items()))


def _softmax_apart(placement: Placement) -> dict[str, float]:
    """Relative difference of each kernel's numbers to those of its twin, on a few logits."""
    device = placement.device
    logits = (torch.randn(3, WORDS, generator=torch.Generator().manual_seed(0)) * 5).to(device, placement.dtype)
    targets = torch.tensor([0, WORDS - 1, 7], device=device)  # at both ends and in between
    lse, logit = vocabulary.logsumexp_and_target_reference(logits, targets)
    found = zip(vocabulary.logsumexp_and_target(logits, targets), (lse, logit), strict=True)
    upstream = torch.tensor([1024.0, -3.0, 1.0], device=device)
    gradient = vocabulary.grad_logits_(logits.clone(), targets, lse, upstream)
    twin = vocabulary.grad_logits_reference_(logits.clone(), targets, lse, upstream)
    return {
        "log-sum-exp": max(relative(one, other) for one, other in found),
        "softmax gradient": relative(gradient, twin),
    }


def _weights_apart(placement: Placement) -> dict[str, float]:
    """The same on a small weight; without Triton, rows on the host have no twin for a GPU."""
    device, dtype, generator = placement.device, placement.dtype, torch.Generator().manual_seed(0)
    weight = Quantised.of(*_in_nf4(torch.randn(64, 256, generator=generator).to(device, dtype)))
    table, index = torch.randn(100, 200, generator=generator).to(dtype), torch.tensor([[0, 99, 7], [7, 50, 1]])
    table, index = table.pin_memory() if device.type == "cuda" else table, index.to(device)
    return {
        "4-bit weights": relative(dequantize.dequantize(weight, dtype), dequantize_reference(weight, dtype)),
        "rows on the host": relative(host_rows(table, index), host_rows_reference(table, index)),
    }


def _in_nf4(values: Tensor) -> tuple[Tensor, Any]:
    packed, state = bnb.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    return packed, state


EXACT = {"fp16": 0.0, "bf16": 0.0, "fp32": 0.0}
SINGLE = {"fp16": 1e-5, "bf16": 1e-5, "fp32": 1e-5}  # fp32 sums of the same logits
ROUNDED = {"fp16": 1e-3, "bf16": 4e-3, "fp32": 1e-5}  # rounded once to the logits' dtype
KERNELS = {  # and the bound of their difference
    "log-sum-exp": SINGLE,
    "softmax gradient": ROUNDED,
    "4-bit weights": ROUNDED,
    "rows on the host": EXACT,
}


def optimizer() -> Finding:
    """One update of the default optimizer, whose first step is the learning rate times the gradient's sign."""
    place, config = choose_placement("auto").device, TrainConfig(learning_rate=1e-3)
    weights = nn.Parameter(torch.linspace(-1, 1, PAGED_SIZE, device=place))
    weights.grad = torch.tensor([0.5, -0.25], device=place).repeat(PAGED_SIZE // 2)
    before = weights.detach().clone()
    built = build_optimizer(weights, config)
    built.step()
    apart = float((before - weights.detach() - config.learning_rate * weights.grad.sign()).abs().max())
    if not apart <= UPDATE_BOUND:
        return fail(
            f"{config.optim}: its first update is off by {apart:.1e}, of {config.learning_rate:g}",
            'bitsandbytes is broken on this device: reinstall it, or set train.optim = "adamw"',
        )
    if place.type == "cpu":
        return ok(f"{config.optim}, in main memory: a CPU does not page")
    if not is_paged(built.state[weights]["state1"]):
        return note(
            f"{config.optim} falls back to ordinary GPU memory",
            "it takes 8 bytes per trained weight; train.optim = paged_adamw_8bit takes 2",
        )
    return ok(f"{config.optim}, its state in paged memory")


def is_paged(state: Any) -> bool:
    """Whether a tensor is in CUDA's managed memory, which bitsandbytes marks by an attribute."""
    return bool(vars(state).get("is_paged", False))


BOUNDS = {"fp32": 1e-5, "fp16": 2e-3}  # of loss and gradient norm, relative; as in tests/gpu
PASSES = 3  # warm-up, capture, replay
ROWS = 8


@dataclass(frozen=True)
class Taken:
    """A step: execution mode, result, and flat gradient (n,) fp32."""

    mode: str
    result: StepResult
    gradient: Tensor


def demo_config(method: str) -> RunConfig:
    """A step of eight built-in rows in micro-batches of one packed row each; a fresh adapter."""
    tables = {
        "method": method,
        "lora": {"r": 16},
        "data": {"limit": ROWS, "max_length": 128},
        "train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS},
    }
    return config_from_tables(tables, "doctor")


def one_step(method: str) -> Finding:
    """Loss and gradient of step 1 of `sft` or `dpo` in both modes; nothing is updated."""
    config = demo_config(method)
    inputs = check_inputs(config)
    policy = build_run_policy(config, inputs)
    rows, mode = tuple(inputs.data.train), choose_execution(config, inputs)
    method_of_run = build_method(config, inputs.attention, rows)
    subject = Subject(config, inputs.tokenizer, policy, method_of_run, rows, 0, mode, {}, 0)
    eager = Taken("eager", *subject.run_step())
    fallen: list[str] = []
    execution = subject.execution(fallen)
    for _ in range(PASSES):
        result, gradient = subject.run_step(execution=execution)
    return judge(policy.placement.precision, eager, Taken(execution.mode, result, gradient), fallen)


def judge(precision: str, eager: Taken, own: Taken, fallen: list[str]) -> Finding:
    """Compare a step in the machine's default mode, or the one it fell back to, with the eager one.

    The precision, fp16 or fp32, sets the bounds; `fallen` has one line for each fallback.
    """
    numbers = [(one.result.metrics["loss"], one.result.grad_norm) for one in (own, eager)]
    apart = max(abs(one - other) / abs(other) for one, other in zip(*numbers, strict=True))
    turned = relative(own.gradient, eager.gradient)
    bound, gradient_bound = BOUNDS[precision], GRADIENT_BOUNDS[precision].gradient
    found = (
        f"{precision}; eager: {_numbers(eager.result)}; {own.mode}{' again' if own.mode == 'eager' else ''}: "
        f"{_numbers(own.result)}; {apart:.1e} apart (bound {bound:g}), the gradient itself {turned:.1e} "
        f"(bound {gradient_bound:g})"
    )
    if not (apart <= bound and turned <= gradient_bound):  # NaN fails both
        return fail(found, 'set train.execution = "eager", and run lowlevel verify on your own run file')
    moved = [one.result.metrics[MARGINS] for one in (eager, own) if not all_ties(one.result)]
    if moved:
        return fail(f"{found}; mean margin {moved[0]:.3g}, not 0", "the reference is not the policy at step 0")
    if MARGINS in eager.result.metrics:
        found += f"; reference equals policy: all {eager.result.count} margins are 0"
    return note(f"{found}; {fallen[0]}", "runs use that mode, which is slower") if fallen else ok(found)


def _numbers(result: StepResult) -> str:
    return f"loss {result.metrics['loss']:.4f}, gradient norm {result.grad_norm:.4f}"
