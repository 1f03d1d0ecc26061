"""Builds the parts of a run: model, optimizer, data order, execution, reference cache, tracer, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.order import DataOrder
from lowlevel.batch.prefetch import Prefetched
from lowlevel.checkpoints.training_state import save_state
from lowlevel.config.schema import RunConfig
from lowlevel.data.examples import PromptExample
from lowlevel.durable import write_json
from lowlevel.execution import WithFallback
from lowlevel.heartbeat import working
from lowlevel.loop import check_evaluation, evaluate_examples
from lowlevel.methods import Method
from lowlevel.methods.choice import build_method, run_loss
from lowlevel.model.base import policy_sha256
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.model.policy import Policy
from lowlevel.online.rollouts import longest_examples
from lowlevel.online.steps import OnlineSteps
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.optim.train_state import TrainState
from lowlevel.ranks import ALONE, Ranks
from lowlevel.reference_cache import CachedReference, reference_identity, with_blanks, with_content
from lowlevel.running.assembly import Inputs, build_run_policy, choose_execution, identity
from lowlevel.running.machine import versions
from lowlevel.running.progress import lines_to
from lowlevel.running.rehearsal import largest_batch, rehearse
from lowlevel.running.run_folder import RunFolder
from lowlevel.tracing import Tracer


@dataclass(frozen=True)
class Job:
    """The parts of a run. `origin` goes into its checkpoints: identity (base, adapters, data) and versions; `ranks`
    share its steps.
    """

    config: RunConfig
    inputs: Inputs
    method: Method
    policy: Policy
    optimizer: torch.optim.Optimizer
    order: DataOrder
    total_steps: int
    origin: dict[str, dict[str, Any]]
    ranks: Ranks = ALONE

    @property
    def manifest(self) -> dict[str, Any]:
        """Base, adapters, data and reference by hash."""
        return self.origin["identity"]


def build_job(config: RunConfig, inputs: Inputs, ranks: Ranks = ALONE) -> Job:
    """Load the model and build the other parts."""
    order = DataOrder.of(config, inputs.data.train)
    policy = build_run_policy(config, inputs)
    optimizer = build_optimizer(policy.flat.weights, config.train, policy.flat.parts)
    manifest = identity(config, inputs, policy, policy_sha256(policy))
    origin = {"identity": manifest, "versions": versions(inputs.placement)}
    method = build_method(config, inputs.attention, inputs.data.train, ranks=ranks.size)
    return Job(config, inputs, method, policy, optimizer, order, order.total_steps(config.train), origin, ranks)


class Engine:
    """Runs a job's steps: execution, reference cache, prefetched batches, tracer, held-out batches."""

    def __init__(self, job: Job, folder: RunFolder, console: Console) -> None:
        config, policy, method = job.config, job.policy, job.method
        with working("dequantising the base"):
            dequantize_as_set(policy, False if job.ranks.sharded else config.train.dequantize_once)
        self.job, self.folder = job, folder
        self.execution = WithFallback(policy, method, choose_execution(config, job.inputs), lines_to(console))
        self.execution.falls_back = not job.ranks.sharded
        self.cached: CachedReference | None = None
        if config.dpo.reference_cache is not None:
            reference = reference_identity(policy, job.manifest["base"]["sha256"], job.manifest["parent_adapter"])
            cache = Path(config.dpo.reference_cache)
            self.cached = CachedReference(self.execution, policy, cache, reference, lines_to(console))
        examples, lay_out = job.inputs.data.train, method.micro_batches
        prepare = with_content(lay_out) if self.cached else lay_out
        rows = job.order.step_rows
        self.online: OnlineSteps | None = None
        self.batches: Callable[[int], list[PackedBatch]]
        if config.sampled:
            prompts = cast("Sequence[PromptExample]", examples)
            parts = (config, policy, method, job.inputs.tokenizer, prompts, job.order, job.ranks, folder.path)
            self.online = self.batches = OnlineSteps(*parts, lines_to(console))
        else:
            self.batches = Prefetched(lambda step: prepare([examples[i] for i in rows(step)]), job.total_steps)
        traced = config.trace.every or config.trace.steps
        self.tracer = Tracer(config, policy, method, folder.trace if job.ranks.first else None) if traced else None
        self.held_out: Sequence[Any] = job.inputs.data.evaluation  # of an online method prompts, else micro-batches
        self.held_out = self.held_out if self.online else evaluation_batches(method, config, job.inputs)

    def rehearse(self) -> None:
        """On a GPU: run the largest micro-batch, and write its memory use to memory.json."""
        job = self.job
        if job.inputs.placement.device.type == "cuda":
            examples = job.inputs.data.train
            examples = longest_examples(job.config, examples) if self.online else examples  # type: ignore[arg-type]
            largest = largest_batch(job.method, examples, job.config.rows_per_step)
            largest = with_blanks(largest) if self.cached else largest
            with working("compiling, and running the largest micro-batch"):
                report = rehearse(job.policy, job.method, self.execution, job.optimizer, largest)
            if job.ranks.first:
                write_json(self.folder.path / "memory.json", report)

    def evaluate(self, step: int) -> dict[str, float]:
        """Loss and metrics of the held-out rows after `step` updates; of an online method rewards of greedy
        completions. Raises NonFiniteError.
        """
        job = self.job
        if self.online:
            return self.online.evaluate(self.held_out, step)
        scores = self.execution.until_it_runs(
            lambda: evaluate_examples(job.policy, job.method, self.held_out, prefix="eval_", ranks=job.ranks)
        )
        check_evaluation(scores, step, self.held_out)
        return scores

    def write_checkpoint(self, state: TrainState) -> None:
        """Write a checkpoint, and flush trace and rollouts before it and the reference cache after it.

        Of several ranks, all must hold the same weights and optimizer state (RankError), and the first one writes.
        """
        job, groups = self.job, self.job.optimizer.state.values()
        moments = [value for group in groups for value in group.values() if isinstance(value, torch.Tensor)]
        job.ranks.check_equal(state.step, {"weights": [job.policy.flat.weights], "optimizer state": moments})
        if job.ranks.first:
            if self.tracer:
                self.tracer.flush()
            if self.online:
                self.online.kept.flush()
            save_state(self.folder.path, job.policy, job.optimizer, state, job.config, job.origin)
        if self.cached:
            self.cached.flush()


def evaluation_batches(method: Method, config: RunConfig, inputs: Inputs) -> list[PackedBatch]:
    """Held-out rows as micro-batches, in the order of the data.

    Packed ones are up to four times as large as in training: without a backward pass there is room for that, and few
    large ones cost less than many small ones, up to some 4,096 positions.
    """
    rows: Sequence[Any] = inputs.data.evaluation
    size = max(1, len(rows)) if config.method == "kto" else config.rows_per_step  # mismatched completions of all rows
    if method.shape is not None and method.packing and not run_loss(config).mixes_pairs:
        capacity = method.shape.capacity
        larger = max(1, min(4, 4096 // capacity))
        method, size = replace(method, shape=replace(method.shape, capacity=larger * capacity)), larger * size
    return [batch for start in range(0, len(rows), size) for batch in method.micro_batches(rows[start : start + size])]
