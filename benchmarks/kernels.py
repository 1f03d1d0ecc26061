"""The parts of a step alone: time, and the share of this GPU's ceilings that each reaches.

    python -m benchmarks.kernels --out out/kernels [--positions 4096]

Writes OUT/kernels.csv: the ceilings first (a large fp16 product, a large copy, empty kernels, host to device), then
each part with its medians and quantiles of 20 calls, a cold cache before each. FLOPs and bytes are the fewest that the
part needs (each input read once, each output written once), so a fraction says how far it is from the best possible.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.counting import ModelShape, Work
from benchmarks.meter import first_line, machine, quantile
from benchmarks.runner import commit, write_table
from benchmarks.timing import CEILING_SIZE, Ceilings, measure_ceilings, seconds_of
from benchmarks.workload import SHAPES, llama_config

FIELDS = ("component", "size", "median_us", "p10_us", "p90_us", "flops", "bytes", "tflops", "gb_per_s",
          "fraction_of_product", "fraction_of_copy", "status", "gpu", "torch", "transformers", "peft", "bitsandbytes",
          "commit", "started")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A call to time. `make` builds the call, so that a part that cannot be built fails alone."""

    component: str
    size: str
    flops: float
    bytes: float
    make: Callable[[], Callable[[], Any]]


def parts(shape: ModelShape, positions: int, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    """Everything that takes time in a step."""
    sizes = dict.fromkeys(shape.linears.values())
    for size_in, size_out in sizes:
        yield from linear_parts(size_in, size_out, positions, device, dtype)
    yield from dropout_parts(shape.hidden, positions, device, dtype)
    yield embedding_part(shape, positions, device, dtype)
    yield from attention_parts(shape, positions, device, dtype)
    yield from head_parts(shape, positions, device, dtype)
    yield from optimizer_parts(shape.trainable, device)


def linear_parts(
    size_in: int, size_out: int, positions: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Part]:
    """A weight's dequantisation, bitsandbytes' and ours; the product alone; both, as a 4-bit layer does them; an
    adapter's two products."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as quantisation

    from lowlevel.kernels.dequantize import Quantised, dequantize

    weights, name = size_in * size_out, f"{size_out}x{size_in}"
    packed = weights * (0.5 + 1 / 64)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    def quantised() -> tuple[Tensor, Any]:
        return quantisation.quantize_4bit(random(size_out, size_in), quant_type="nf4", compress_statistics=True)

    def dequantise() -> Callable[[], Tensor]:
        data, state = quantised()
        return lambda: quantisation.dequantize_4bit(data, state)

    def in_one_kernel() -> Callable[[], Tensor]:
        weight = Quantised.of(*quantised())
        return lambda: dequantize(weight, dtype)

    def layer() -> Callable[[], Tensor]:
        module = bnb.nn.Linear4bit(size_in, size_out, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
        x = random(positions, size_in)
        return lambda: module(x)

    def product() -> Callable[[], Tensor]:
        x, w = random(positions, size_in), random(size_out, size_in)
        return lambda: torch.nn.functional.linear(x, w)

    def adapter(rank: int = 64) -> Callable[[], Tensor]:
        x, a, b = random(positions, size_in), random(rank, size_in), random(size_out, rank)
        return lambda: x @ a.T @ b.T

    flops, moved = 2.0 * positions * weights, 2 * positions * (size_in + size_out)
    yield Part("dequantise nf4, bitsandbytes", name, 0, packed + 2 * weights, dequantise)
    yield Part("dequantise nf4, one kernel", name, 0, packed + 2 * weights, in_one_kernel)
    name = f"{positions} rows, {name}"
    yield Part("linear fp16", name, flops, moved + 2 * weights, product)
    yield Part("linear nf4", name, flops, moved + packed, layer)
    yield Part("adapter r=64", name, 128.0 * positions * (size_in + size_out), moved, adapter)


def dropout_parts(features: int, positions: int, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    """Counter dropout as eager execution runs it, and compiled."""
    from lowlevel.model.dropout import drop

    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        keys = [torch.randint(-(2**31), 2**31, (n,), device=device).to(torch.int32) for n in (positions, features)]
        return torch.randn(1, positions, features, device=device, dtype=dtype), keys[0][None], keys[1]

    def eager() -> Callable[[], Tensor]:
        x, tokens, keys = tensors()
        return lambda: drop(x, tokens, keys, 0.1)

    def compiled() -> Callable[[], Tensor]:
        x, tokens, keys = tensors()
        fused = torch.compile(drop)
        return lambda: fused(x, tokens, keys, 0.1)

    size = f"{positions}x{features}"
    yield Part("dropout, eager", size, 0, 4 * positions * features, eager)
    if device.type == "cuda":
        yield Part("dropout, compiled", size, 0, 4 * positions * features, compiled)


def embedding_part(shape: ModelShape, positions: int, device: torch.device, dtype: torch.dtype) -> Part:
    """Rows of an input embedding that lies in pinned host memory; the fraction is of a device copy."""
    from lowlevel.kernels.host_rows import host_rows

    def call() -> Callable[[], Tensor]:
        table = torch.randn(shape.vocabulary, shape.hidden, dtype=dtype)
        table = table.pin_memory() if device.type == "cuda" else table
        index = torch.randint(0, shape.vocabulary, (positions,), device=device)
        return lambda: host_rows(table, index)

    return Part("embedding on the host", f"{positions}x{shape.hidden}", 0, 4 * positions * shape.hidden, call)


def attention_parts(shape: ModelShape, positions: int, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    """Attention of sequences of 512 side by side in one row, forward and backward, by kernel."""
    from lowlevel.kernels.attention import span_attention

    length = min(512, positions)
    count, head = positions // length, shape.hidden // shape.heads
    pairs = Work(positions, 0, count * length * (length + 1) // 2).pairs

    def make(kernel: str, backward: bool) -> Callable[[], Callable[[], Any]]:
        def call() -> Callable[[], Any]:
            q, k, v = (
                torch.randn(positions, heads, head, device=device, dtype=dtype, requires_grad=backward)
                for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
            )
            bounds = torch.arange(0, positions + 1, length, device=device, dtype=torch.int32)
            grad = torch.randn(positions, shape.heads, head, device=device, dtype=dtype)

            def attend() -> Any:
                output = span_attention(q, k, v, bounds, bounds, length, head**-0.5, kernel)
                return torch.autograd.grad(output, (q, k, v), grad) if backward else output

            return attend

        return call

    moved = 2 * positions * (2 * shape.hidden + 2 * shape.kv)
    for kernel in ("flash", "efficient") if device.type == "cuda" else ("math",):
        size = f"{count}x{length}, {shape.heads}/{shape.kv_heads} heads"
        yield Part(f"attention {kernel}, forward", size, 4.0 * pairs * shape.hidden, moved, make(kernel, False))
        yield Part(f"attention {kernel}, both", size, 14.0 * pairs * shape.hidden, 3 * moved, make(kernel, True))


def head_parts(shape: ModelShape, positions: int, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    """Log-probabilities of targets from hidden states, in plain torch and with fused kernels; forward, and both."""
    from lowlevel.losses import token_logps

    variants: dict[str, Callable[..., Tensor]] = {"torch": token_logps}
    if importlib.util.find_spec("lowlevel.kernels") and importlib.util.find_spec("lowlevel.kernels.token_logps"):
        from lowlevel.kernels.token_logps import token_logps as fused_token_logps

        variants["fused"] = fused_token_logps

    def make(logps: Callable[..., Tensor], backward: bool) -> Callable[[], Callable[[], Any]]:
        def call() -> Callable[[], Any]:
            hidden = torch.randn(positions, shape.hidden, device=device, dtype=dtype, requires_grad=backward)
            weight = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype) * 0.02
            targets = torch.randint(0, shape.vocabulary, (positions,), device=device)
            grad = torch.rand(positions, device=device)

            def run() -> Any:
                result = logps(hidden, weight, targets)
                return torch.autograd.grad(result, hidden, grad) if backward else result

            return run

        return call

    product = 2.0 * positions * shape.hidden * shape.vocabulary
    moved = 2 * (positions * shape.hidden + shape.hidden * shape.vocabulary)
    for name, function in variants.items():
        size = f"{positions}x{shape.hidden}, {shape.vocabulary} words"
        yield Part(f"token_logps {name}, forward", size, product, moved, make(function, False))
        yield Part(f"token_logps {name}, both", size, 3 * product, 3 * moved, make(function, True))


def optimizer_parts(weights: int, device: torch.device) -> Iterator[Part]:
    """Clipping and AdamW on one flat buffer of adapter weights."""
    from lowlevel.config.schema import TrainConfig
    from lowlevel.optim.optimizer import build_optimizer

    def flat() -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.randn(weights, device=device) * 0.01)
        parameter.grad = torch.randn(weights, device=device)
        return parameter

    def clip() -> Callable[[], Tensor]:
        grad = flat().grad
        assert grad is not None
        return lambda: grad.mul_((1.0 / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0))

    def step(optim: str) -> Callable[[], Callable[[], Any]]:
        return lambda: build_optimizer(flat(), TrainConfig.model_validate({"optim": optim})).step

    yield Part("clip", f"{weights}", 0, 12 * weights, clip)
    for optim, state in (("paged_adamw_32bit", 16), ("paged_adamw_8bit", 4), ("adamw", 16)):
        yield Part(optim, f"{weights}", 0, (12 + state) * weights, step(optim))


def time_part(part: Part, ceilings: Ceilings) -> dict[str, Any]:
    """A part's row."""
    try:
        seconds = seconds_of(part.make())
    except Exception as error:
        return {"component": part.component, "size": part.size, "status": f"failed: {first_line(error)}"}
    median = statistics.median(seconds)
    return {
        "component": part.component,
        "size": part.size,
        "median_us": round(median * 1e6, 2),
        "p10_us": round(quantile(seconds, 10) * 1e6, 2),
        "p90_us": round(quantile(seconds, 90) * 1e6, 2),
        "flops": part.flops,
        "bytes": part.bytes,
        "tflops": round(part.flops / median / 1e12, 3),
        "gb_per_s": round(part.bytes / median / 1e9, 1),
        "fraction_of_product": round(part.flops / median / ceilings.matmul_flops, 3),
        "fraction_of_copy": round(part.bytes / median / ceilings.copy_bytes, 3),
        "status": "ok",
    }


def ceiling_rows(ceilings: Ceilings, size: int) -> list[dict[str, Any]]:
    """The ceilings, as t4.py reads them."""
    return [
        {"component": "ceiling: product", "size": f"{size}^3", "tflops": ceilings.matmul_flops / 1e12},
        {"component": "ceiling: copy", "gb_per_s": ceilings.copy_bytes / 1e9},
        {"component": "ceiling: kernel in a graph", "median_us": ceilings.kernel_seconds * 1e6},
        {"component": "ceiling: launch from Python", "median_us": ceilings.launch_seconds * 1e6},
        {"component": "ceiling: host to device", "gb_per_s": ceilings.link_bytes / 1e9},
    ]


def line(row: dict[str, Any]) -> str:
    """A row as one line: microseconds, TFLOP/s, GB/s, and the fractions of both ceilings."""
    names = ("median_us", "tflops", "gb_per_s", "fraction_of_product", "fraction_of_copy")
    numbers = "".join(f"{row[name]:>10.5g}" if name in row else " " * 10 for name in names)
    return f"{row['component']:<30}{row.get('size', ''):<28}{numbers}  {row['status']}"


def main() -> None:
    """Measure ceilings, then parts; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/kernels"))
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    size = CEILING_SIZE if device.type == "cuda" else 256
    ceilings = measure_ceilings(device, size)
    shape = ModelShape.of(llama_config(options.shape), 64)
    shared = {**machine(), "commit": commit(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    rows = [{**row, "status": "ok", **shared} for row in ceiling_rows(ceilings, size)]
    done = set()
    for positions in options.positions:
        for part in parts(shape, positions, device, dtype):
            if (part.component, part.size) in done:  # the same at every number of positions
                continue
            done.add((part.component, part.size))
            rows.append({**time_part(part, ceilings), **shared})
    write_table(options.out / "kernels.csv", rows, FIELDS)
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
