"""Tokens a second of sampling from a 4-bit base with an active adapter: this sampler and Hugging Face's generate.

    python -m benchmarks.sampling --out out/sampling [--shape tinyllama] [--prompt 128] [--new 128] [--batches 8 64]

Random weights, LoRA on all projections; no token is a stop token, so every completion has all its tokens. Medians over
`--repeats` calls after a warm-up; prompts are read in each. Also: seconds to the first token of a new sampler, the
largest difference between the sampler's log-probabilities and the trainer's, and on a GPU the kernels of one decoding
step. Writes OUT/sampling.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.meter import first_line, machine, synchronize
from benchmarks.runner import commit, write_table
from benchmarks.workload import SHAPES, make_model
from lowlevel.batch.layout import build_batch
from lowlevel.batch.segments import sft_segment
from lowlevel.config.schema import ALL_PROJECTIONS, LoraConfig, ModelConfig
from lowlevel.model.attention_choice import choose_attention, plain_attention
from lowlevel.model.base import load_base, load_model_config
from lowlevel.model.build import build_policy
from lowlevel.model.placement import choose_placement
from lowlevel.model.policy import Policy
from lowlevel.sampling import FastSampler, PlainSampler, Sampling

FIELDS = ("case", "batch", "prompt", "new", "tokens_per_second", "ms_per_token_step", "median_seconds", "p_min",
          "p_max", "repeats", "peak_allocated_gib", "status", "shape", "gpu", "torch", "transformers", "peft",
          "bitsandbytes", "commit", "started")  # fmt: skip
NEVER = -1  # a stop token that no vocabulary has


def make_policy(folder: Path, shape: str, rank: int) -> Policy:
    """The shape's base in 4 bits with an adapter on all projections whose B is not zero."""
    if not (folder / "config.json").exists():
        make_model(folder, shape, 8192)
    placement, config = choose_placement("auto"), ModelConfig(name=str(folder))
    attention = choose_attention(config, load_model_config(config), placement)
    base = load_base(config, placement, attention=attention.implementation)
    lora = LoraConfig(r=rank, target_modules=ALL_PROJECTIONS)
    policy = build_policy(base, lora, placement, seed=0, gradient_checkpointing=False, attention=attention)
    with torch.no_grad():
        for name, view in policy.flat.views.items():
            if ".lora_B." in name:
                view.normal_(std=1e-3)
    return policy


def prompts_of(policy: Policy, number: int, length: int) -> list[list[int]]:
    """Random prompts."""
    words = policy.lm_head_weight.shape[0]
    return np.random.default_rng(number).integers(3, words, (number, length)).tolist()


def hugging_face(policy: Policy, new: int) -> Callable[[list[list[int]]], Any]:
    """Its generate as people call it: sampling, a growing cache."""
    base: Any = policy.causal_lm
    device = policy.placement.device
    settings: Any = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": new, "min_new_tokens": new,
                     "use_cache": True, "pad_token_id": 0}  # fmt: skip

    def call(prompts: list[list[int]]) -> Any:
        ids = torch.tensor(prompts, device=device)
        policy.dropout.disable()
        with torch.no_grad(), plain_attention(base), policy.placement.autocast():
            return base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    return call


def measure(call: Callable[[list[list[int]]], Any], prompts: list[list[int]], new: int, repeats: int) -> dict[str, Any]:
    """Seconds of a call, from prompts on the host to tokens on the host."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):  # runs uncaptured, captures, replays
        call(prompts)
    seconds = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        call(prompts)
        synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    speed = round(len(prompts) * new / median, 1)
    return {"tokens_per_second": speed, "ms_per_token_step": round(1e3 * median / new, 4),
            "median_seconds": round(median, 5), "p_min": round(min(seconds), 5), "p_max": round(max(seconds), 5),
            "repeats": repeats, "peak_allocated_gib": round(peak, 3), "status": "ok"}  # fmt: skip


def difference(policy: Policy, sampler: FastSampler, prompts: list[list[int]], new: int) -> str:
    """Log-probabilities of sampled tokens: the sampler's against the trainer's."""
    found = [group[0] for group in sampler.sample(prompts, Sampling(new, 1.0))]
    segments = []
    for i, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        whole = np.concatenate([np.array(prompt), one.ids])
        segments.append([sft_segment(i, i, whole, np.where(np.arange(len(whole)) < len(prompt), -100, whole))])
    batch = build_batch(segments, pairs=False).to(policy.placement.device)
    policy.dropout.disable()
    with torch.no_grad():
        expected = policy.token_logps(batch).cpu().numpy()
    apart = np.abs(np.concatenate([one.logps for one in found]) - expected)
    return f"log-probabilities, sampler against trainer: largest difference {apart.max():.2e}, mean {apart.mean():.2e}"


def agreement(policy: Policy, sampler: FastSampler, prompts: list[list[int]], new: int) -> str:
    """Greedy tokens: the sampler's against Hugging Face's."""
    plain = PlainSampler(policy.model, policy.placement, [NEVER + 1])
    pairs = zip(sampler.sample(prompts, Sampling(new)), plain.sample(prompts, Sampling(new)), strict=True)
    same = [int((a[0].ids[: len(b[0].ids)] == b[0].ids).cumprod().sum()) for a, b in pairs]
    return f"greedy tokens equal to Hugging Face's up to the first difference: {sum(same)} of {new * len(prompts)}"


def kernels(sampler: FastSampler, rows: int) -> str:
    """The kernels of one decoding step by the time that they take, of a captured step."""
    from torch.profiler import ProfilerActivity, profile

    steps = 5
    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            sampler.steps.step(rows)
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    begun, ended = [], []
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name][0] += 1 / steps
            totals[event.name][1] += event.time_range.elapsed_us() / steps
            begun.append(event.time_range.start)
            ended.append(event.time_range.end)
    lines = [f"{'us a step':>10}{'launches':>10}{'us each':>9}  kernel, batch {rows}"]
    for name, (count, total) in sorted(totals.items(), key=lambda item: -item[1][1])[:40]:
        lines.append(f"{total:>10.1f}{count:>10.1f}{total / count:>9.2f}  {name[:150]}")
    busy, count = sum(t for _, t in totals.values()), sum(n for n, _ in totals.values())
    lines.append(
        f"{busy:>10.1f}{count:>10.1f}           in all; from first to last {(max(ended) - min(begun)) / steps:.1f}"
    )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/sampling"))
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peers", type=int, default=1, help="repeats of Hugging Face's generate; 0: leave it out")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write the table."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    policy = make_policy(options.out / "model", options.shape, options.rank)
    shared = {**machine(), "shape": options.shape, "commit": commit(),
              "started": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    rows: list[dict[str, Any]] = []

    def add(case: str, batch: int, call: Callable[[list[list[int]]], Any], repeats: int) -> None:
        prompts = prompts_of(policy, batch, options.prompt)
        row: dict[str, Any] = {"case": case, "batch": batch, "prompt": options.prompt, "new": options.new}
        try:
            row |= measure(call, prompts, options.new, repeats)
        except Exception as error:
            row["status"] = f"failed: {first_line(error)}"
        rows.append(row | shared)
        print(f"{case:<28}{batch:>5}{row.get('tokens_per_second', ''):>12}{row.get('ms_per_token_step', ''):>10}  "
              f"{row['status']}", flush=True)  # fmt: skip
        write_table(options.out / "sampling.csv", rows, FIELDS)

    print(f"{'case':<28}{'batch':>5}{'tokens/s':>12}{'ms/step':>10}")
    for name, settings in cases():
        began = time.perf_counter()
        sampler = FastSampler(policy.model, policy.placement, [NEVER], **settings)
        sampler.sample(prompts_of(policy, 1, options.prompt), Sampling(1, 1.0))
        synchronize()
        print(f"{name}: first token {time.perf_counter() - began:.2f} s after the sampler was made", flush=True)
        for batch in options.batches:
            sampling = Sampling(options.new, 1.0)
            add(name, batch, partial(sampler.sample, sampling=sampling), options.repeats)
            report(policy, sampler, batch, options)
            if (why := sampler.steps.failure) is not None:
                print("".join(traceback.format_exception(why)), flush=True)
        del sampler
    for batch in options.batches if options.peers else ():
        add("Hugging Face's generate", batch, hugging_face(policy, options.new), options.peers)


def cases() -> Sequence[tuple[str, dict[str, Any]]]:
    """Settings of this sampler, by the name of the case."""
    return (("lowlevel", {}), ("lowlevel, weights in 4 bits", {"join": False}))


def report(policy: Policy, sampler: FastSampler, batch: int, options: argparse.Namespace) -> None:
    """Print how close the numbers are, and where the time goes."""
    prompts = prompts_of(policy, min(batch, 8), options.prompt)
    for make in (
        lambda: difference(policy, sampler, prompts, options.new),
        lambda: agreement(policy, sampler, prompts[:4], min(options.new, 32)) if options.peers else "",
        lambda: kernels(sampler, batch) if torch.cuda.is_available() else "",
    ):
        try:
            print(make(), flush=True)
        except Exception as error:
            print(f"failed: {first_line(error)}", flush=True)


if __name__ == "__main__":
    main()
