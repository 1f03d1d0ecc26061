"""Opens a run from its folder: its placement on this machine, its rows, and its model.

Rows, base and frozen adapter must have the hashes of the manifest. A machine without the run's precision uses its own
and prints a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowlevel.batch.order import DataOrder
from lowlevel.checkpoints.training_state import checkpoint_with_reference, restore_reference
from lowlevel.config.given import GivenRows
from lowlevel.config.schema import RunConfig
from lowlevel.data.prepare import PreparedData
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.errors import CheckpointError, ConfigError, DataError, how_many
from lowlevel.methods import Method
from lowlevel.methods.choice import build_method, run_loss
from lowlevel.model.adapters import adapter_sha256
from lowlevel.model.attention_choice import Attention, choose_attention
from lowlevel.model.base import load_model_config, policy_sha256
from lowlevel.model.placement import Placement, dtype_name
from lowlevel.model.policy import Policy
from lowlevel.online import rollouts
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.assembly import Inputs, load_policy, load_run_tokenizer, prepare_data
from lowlevel.running.machine import ENVIRONMENT, placement_here
from lowlevel.running.run_folder import RunFolder

Note = Callable[[str], None]
NAMED = {"base", "parent_adapter", "data_sha256"}  # required keys of a manifest


@dataclass(frozen=True)
class Stage:
    """One point of the chain base -> SFT -> DPO: which adapters are active."""

    name: str
    parent: bool
    trained: bool


@dataclass(frozen=True)
class LoadedRun:
    """A run, ready for forward passes. `policy.activate` switches between its stages."""

    opened: Reopened
    folder: RunFolder
    config: RunConfig
    tokenizer: ChatTokenizer
    policy: Policy
    stages: tuple[Stage, ...]

    @cached_property
    def method(self) -> Method:
        """See `Reopened.method`. Built on demand, because generating and merging need no loss."""
        return self.opened.method()

    def activate(self, stage: Stage) -> None:
        """Switch the adapters to those of a stage."""
        self.policy.activate(parent=stage.parent, trained=stage.trained)


@dataclass(frozen=True)
class Reopened:
    """A run before its rows are read and its model is loaded.

    Attributes:
        placement: with the run's precision if this machine has it, else with this machine's.
        moved: why numbers may differ from the run's in their last bits, or None.
        elsewhere: the run computed on another device, or on a CPU with another number of threads; None: not known.
        parent: the frozen adapter in the run folder.
        note: prints a line for the user.
    """

    folder: RunFolder
    config: RunConfig
    manifest: dict[str, Any]
    placement: Placement
    moved: str | None
    elsewhere: bool | None
    attention: Attention
    parent: Path | None
    note: Note

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The base, the frozen adapter if there is one, and the trained one."""
        parent = (Stage("sft", True, False),) if self.parent else ()
        return Stage("base", False, False), *parent, Stage(self.config.method, True, True)

    def data(self) -> tuple[ChatTokenizer, PreparedData]:
        """The run's tokenizer and examples. Raises ConfigError, or DataError if the training rows changed."""
        tokenizer, data = prepare_data(self.config)
        if data.report.train.fingerprint != self.manifest["data_sha256"]:
            source, folder = self.config.data.names, self.folder.path
            raise DataError(f"{source}: not the rows that {folder} trained on, so its steps cannot be rebuilt")
        return tokenizer, data

    def held_out(self) -> Sequence[Any]:
        """The examples for evaluation, if any. Raises ConfigError, or DataError if they changed since the run."""
        source, folder = self.config.data.eval_source, self.folder.path
        if source is None:
            return []
        data = prepare_data(self.config)[1]
        report = data.report.evaluation
        if report is None or report.fingerprint != self.manifest.get("evaluation_sha256"):
            name = self.config.data.names if source == "holdout" else source
            raise DataError(f"{name}: not the rows that {folder} held out: the run may have trained on them")
        return data.evaluation

    def inputs(self, adapter: Path | None = None) -> Inputs:
        """The inputs of the training run, with the training rows checked; `adapter` as in `policy`."""
        tokenizer, data = self.data()
        trained = adapter or find_adapter(self.config.lora.init_from, "lora.init_from")
        merged = self.manifest["base"].get("merged_adapter")
        return Inputs(tokenizer, data, self.placement, self.attention, self.parent, trained, merged)

    def policy(self, adapter: Path | None = None, *, training: bool = False) -> Policy:
        """The base with the run's adapters, both checked against the manifest.

        Args:
            adapter: PEFT folder with the trained adapter's weights; None: the weights at the start of the run.
            training: recompute and offload as in training; False: for forward passes, with everything on the device.

        Raises:
            CheckpointError: base or frozen adapter differ from the run's, or are damaged.
        """
        if self.parent and adapter_sha256(self.parent) != self.manifest["parent_adapter"]:
            raise CheckpointError(f"{self.parent}: not the frozen adapter of this run (its hash is not the manifest's)")
        config = self.config if training else _without_backward(self.config)
        trained = adapter or find_adapter(self.config.lora.init_from, "lora.init_from")
        policy = load_policy(config, self.placement, self.attention, parent=self.parent, init_from=trained)
        hashes = self.base_hashes(policy)
        if hashes and hashes[0] != hashes[1]:
            name, hint = self.config.model.name, ""
            if self.elsewhere is None and self.config.model.load_in_4bit:
                hint = f"; {ENVIRONMENT}, which names the machine that quantised it, cannot be read"
            found = f"(hash {hashes[0][:12]}){hint}"
            raise CheckpointError(f"{self.folder.path}: base {name!r} is not the one that was trained on {found}")
        return policy

    def base_hashes(self, policy: Policy) -> tuple[str, str] | None:
        """SHA-256 of the base as loaded here, and in the manifest; None and a printed note if they cannot be compared.

        The hash is over the tensors as used: rounded to the run's dtype, then quantised. Another dtype gives other
        tensors, and the means of nested quantisation depend on the device and the number of threads in their last bits.
        Those of a pre-quantised base are in its files.
        """
        base, here = self.manifest["base"], dtype_name(self.placement.dtype)
        why = f": {self.moved}" if self.moved else ""
        if base["dtype"] != here:
            self.note(f"note: the base is not checked: its hash is for {base['dtype']}, and it is {here} here{why}")
            return None
        found = policy_sha256(policy)
        quantised_here = self.config.model.load_in_4bit and not base.get("prequantised")
        if found != base["sha256"] and self.elsewhere and quantised_here:
            self.note(f"note: the base is not checked: quantised on another machine, it has another hash{why}")
            return None
        return found, base["sha256"]

    def method(self, examples: Sequence[Any] | None = None) -> Method:
        """The run's method; `examples`: its training examples, for micro-batches as in training.

        Raises ConfigError without its loss, CheckpointError if the loss's source changed.
        """
        try:
            spec = run_loss(self.config)
        except ValueError as error:
            raise ConfigError(f"{self.folder.path}: {error}") from None
        was = self.manifest.get("loss_sha256")
        if spec.sha256 != was:
            hashes = f"hash {(spec.sha256 or 'built in')[:12]}, the run's {(was or 'built in')[:12]}"
            raise CheckpointError(f'{self.folder.path}: loss "{spec.name}": its source is not the run\'s ({hashes})')
        return build_method(self.config, self.attention, examples)

    def load_reference(self, policy: Policy, adapter: Path | None) -> None:
        """Give a moving reference the weights that it had when the trained adapter was `adapter`; None: at the start.

        Raises CheckpointError if they are gone.
        """
        if policy.moving is not None and adapter is not None:
            restore_reference(policy, checkpoint_with_reference(self.folder.path, adapter))

    def load(self, adapter: Path | None, *, reference: bool = False) -> LoadedRun:
        """The run for forward passes; `adapter` and errors as in `policy`. Reads no rows.

        `reference`: also for passes of a moving reference; errors as in `load_reference`.
        """
        tokenizer, policy = load_run_tokenizer(self.config), self.policy(adapter)
        if reference:
            self.load_reference(policy, adapter)
        return LoadedRun(self, self.folder, self.config, tokenizer, policy, self.stages)


def reopen(
    run_dir: Path, note: Note = print, *, data: GivenRows | None = None, eval_data: GivenRows | None = None
) -> Reopened:
    """Open the folder of a finished, stopped or running run. Writes nothing and takes no lock.

    If the run's rows were given in Python, reading them needs the same rows again, as `data` and `eval_data`.

    Raises:
        ConfigError: not a run folder, or the base cannot be read.
        CheckpointError: manifest or frozen adapter are missing or incomplete.
    """
    folder = RunFolder(run_dir)
    config, manifest = with_rows(folder.read_config(), data, eval_data), folder.read_manifest()
    base = manifest.get("base")
    if not (isinstance(base, dict) and NAMED <= manifest.keys() and {"sha256", "dtype"} <= base.keys()):
        raise CheckpointError(f"{folder.path / 'manifest.json'} lacks a hash of the run's base, adapter or data")
    parent = folder.parent if folder.parent.exists() else None
    if manifest["parent_adapter"] and parent is None:
        raise CheckpointError(f"{folder.parent} is missing: the frozen adapter of this run")
    placement, moved, elsewhere = placement_here(folder, config, base["dtype"])
    attention = choose_attention(config.model, load_model_config(config.model), placement)
    return Reopened(folder, config, manifest, placement, moved, elsewhere, attention, parent, note)


def check_gives_text(config: RunConfig, run_dir: Path) -> None:
    """Raise ConfigError for a reward model."""
    if config.method == "reward":
        raise ConfigError(f"{run_dir} is a reward model: it gives numbers and no text; use lowlevel score")


def with_rows(config: RunConfig, data: GivenRows | None, eval_data: GivenRows | None) -> RunConfig:
    """The configuration with rows given in Python."""
    given: dict[str, Any] = {} if data is None else {"source": data, "sources": ()}
    given |= {} if eval_data is None else {"eval_source": eval_data}
    return config.changed(data=given)


def load_run(run_dir: Path, note: Note = print, *, adapter: Path | None = None) -> LoadedRun:
    """A finished run's base and adapters, for forward passes.

    `note` prints a line for the user; `adapter` is a checkpoint to use instead of the final adapter.

    Raises:
        ConfigError: not a run folder, not finished, or a reward model.
        CheckpointError: base or frozen adapter differ from the run's.
    """
    opened = reopen(run_dir, note)
    check_gives_text(opened.config, run_dir)
    return opened.load(adapter or opened.folder.final_adapter())


def step_examples(config: RunConfig, data: PreparedData, step: int, run_dir: Path | None = None) -> list[Any]:
    """The examples of step `step`, counted from 1 as in the log; those of an online method are kept in `run_dir`.

    Raises ConfigError, which names the option --step; CheckpointError if completions are not kept.
    """
    order = DataOrder.of(config, data.train)
    total = order.total_steps(config.train)
    if not 1 <= step <= total:
        raise ConfigError(f"--step {step}: the run has {how_many(total, 'steps')}")
    if config.sampled:
        return rollouts.step_examples(config, kept_rollouts(config, run_dir, step))
    return [data.train[i] for i in order.step_rows(step - 1)]


def kept_rollouts(config: RunConfig, run_dir: Path | None, step: int) -> list[rollouts.Rollout]:
    """The completions of step `step` of a run of an online method. Raises ConfigError without a run."""
    if run_dir is None:
        raise ConfigError(f"{config.method} trains on completions that a run samples: give its run folder")
    repeats = config.sampled.num_iterations if config.sampled else 1
    return rollouts.KeptRollouts(run_dir).read((step - 1) // repeats * repeats + 1)


def _without_backward(config: RunConfig) -> RunConfig:
    """The configuration for forward passes, which keep no activations and have memory for the embeddings.

    The embeddings must be on the layers' device: transformers 5.23's `generate` moves its inputs to the device of the
    model's first parameter, the input embedding.
    """
    forward = {"gradient_checkpointing": False, "recomputed_layers": None, "offload_activations": False}
    return config.changed(model={"embeddings_on_host": False}, train=forward)
