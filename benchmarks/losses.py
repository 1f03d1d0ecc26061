"""Preference losses side by side on one data set: held-out pairs, displacement, replies, at equal steps.

    python -m benchmarks.losses --model DIR --train pairs.jsonl --held-out held_out.jsonl --steps 100 --seeds 0 1 \\
        --out benchmarks/results/losses_h200.csv

Every loss trains a fresh adapter on the same rows in the same order, with its default hyper-parameters and one learning
rate. The columns, all on the held-out pairs and against the base:

    accuracy          share of pairs whose chosen completion gained more log-probability than the rejected one
    chosen, rejected  mean change of the log-probability of a completion, in nats
    reply, ended      mean tokens of greedy replies to the prompts, and the share that ended with a stop token
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lowlevel as ll
from lowlevel.config.offline import DPOConfig
from lowlevel.config.schema import RunConfig
from lowlevel.data.examples import PreferenceExample
from lowlevel.methods.dpo import DPO, reference_token_logps
from lowlevel.model.policy import Policy
from lowlevel.running.assembly import check_inputs
from lowlevel.running.replies import generate_replies
from lowlevel.sampling import Sampling, build_sampler

LOSSES = ("sigmoid", "ipo", "simpo", "orpo", "cpo", "kto", "dpop")


@dataclass(frozen=True)
class Row:
    """One trained loss."""

    loss: str
    seed: int
    steps: int
    accuracy: float
    chosen: float
    rejected: float
    reply: float
    ended: float
    train_loss: float
    tokens_per_second: float  # median over the steps after the first quarter


def settings_of(options: argparse.Namespace, loss: str, seed: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """Method and settings of a run."""
    method = "kto" if loss == "kto" else "dpo"
    rows = 2 if method == "kto" else 1  # a pair is two rows of kto
    settings = {
        "model": options.model,
        "data": options.train,
        "output_dir": folder,
        "restart": True,
        "max_steps": options.steps,
        "per_device_train_batch_size": 4 * rows,
        "gradient_accumulation_steps": 2,
        "learning_rate": options.learning_rate,
        "warmup_ratio": 0.1,
        "r": options.rank,
        "max_length": options.max_length,
        "load_in_4bit": not options.unquantised,
        "seed": seed,
        "logging_steps": 1,
        "on_bad_row": "skip",
    }
    return method, settings if method == "kto" else {**settings, "loss": loss}


def train(options: argparse.Namespace, loss: str, seed: int, folder: Path) -> Any:
    """The finished run."""
    method, settings = settings_of(options, loss, seed, folder)
    return ll.train(method, console=Console(quiet=True), **settings)


def held_out(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Tokenizer and examples of the held-out pairs, from the run's own preparation of rows."""
    config: RunConfig = ll.configure(
        "dpo", model=options.model, data=options.held_out, max_length=options.max_length, on_bad_row="skip"
    )
    inputs = check_inputs(config)
    return inputs.tokenizer, list(inputs.data.train)


@torch.no_grad()
def change(policy: Policy, pairs: Sequence[PreferenceExample]) -> torch.Tensor:
    """Log-ratio to the base of each completion, (2, P): chosen, rejected."""
    method = DPO(DPOConfig(), 8, 4096, packing=False)
    parts = []
    policy.dropout.disable()
    for start in range(0, len(pairs), 8):
        for batch in method.micro_batches(pairs[start : start + 8]):
            moved = batch.to(policy.placement.device)
            logratios = policy.token_logps(moved) - reference_token_logps(policy, moved)
            parts.append(moved.sequence_sums(logratios).view(2, -1)[:, : len(batch.data_rows)])
    return torch.cat(parts, 1).cpu()


def measure(options: argparse.Namespace, loss: str, seed: int, tokenizer: Any, pairs: list[PreferenceExample]) -> Row:
    """Train and evaluate one loss."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(options, loss, seed, Path(folder) / "run")
        policy = run.policy
        chosen, rejected = change(policy, pairs)
        prompts = [pair.prompt_ids.tolist() for pair in pairs[: options.replies]]
        sampling = Sampling(max_new_tokens=options.new_tokens)
        sampler = build_sampler(policy.model, policy.placement, tokenizer.stop_ids, print)
        replies = generate_replies(sampler, tokenizer, prompts, sampling)
        speeds = sorted(record["tokens_per_second"] for record in run.metrics[options.steps // 4 :] if "loss" in record)
        gained = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        return Row(
            loss,
            seed,
            options.steps,
            float(gained.mean()),
            float(chosen.mean()),
            float(rejected.mean()),
            sum(reply.num_tokens for reply in replies) / max(1, len(replies)),
            sum(reply.ended for reply in replies) / max(1, len(replies)),
            float(run.summary["train_loss"]),
            speeds[len(speeds) // 2],
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--train", default="demo", help="pairs to train on")
    parser.add_argument("--held-out", default="demo", help="other pairs")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--unquantised", action="store_true")
    parser.add_argument("--replies", type=int, default=64, help="held-out prompts to reply to")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Train and evaluate each loss with each seed."""
    options = arguments()
    tokenizer, pairs = held_out(options)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with options.out.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            [f.name for f in dataclasses.fields(Row)] + ["held_out", "device", "torch", "lowlevel", "commit"]
        )
        for seed in options.seeds:
            for loss in options.losses:
                began = time.perf_counter()
                row = measure(options, loss, seed, tokenizer, pairs)
                writer.writerow(
                    [*dataclasses.astuple(row), len(pairs), device, torch.__version__, ll.__version__, commit]
                )
                stream.flush()
                print(f"{row} in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
