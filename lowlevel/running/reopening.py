"""A run that was trained, opened again from its folder: where its model runs here, its rows, and its model.

What is opened is what the manifest says, or an error: rows with another fingerprint, a base or a frozen adapter with
another hash. A machine that has not got the run's precision takes its own, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lowlevel.batch.order import DataOrder
from lowlevel.config.given import GivenRows
from lowlevel.config.schema import RunConfig
from lowlevel.data.prepare import PreparedData
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.errors import CheckpointError, ConfigError, DataError
from lowlevel.methods import Method
from lowlevel.model.adapters import adapter_sha256
from lowlevel.model.attention_choice import Attention, choose_attention
from lowlevel.model.base import base_sha256, load_model_config
from lowlevel.model.placement import DTYPES, Placement, choose_placement, dtype_name
from lowlevel.model.policy import Policy
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.assembly import Inputs, build_method, load_policy, load_run_tokenizer, prepare_data, run_loss
from lowlevel.running.run_folder import RunFolder

Note = Callable[[str], None]
ENVIRONMENT = "environment.json"
NAMED = {"base", "parent_adapter", "data_sha256"}  # what a manifest must say


@dataclass(frozen=True)
class Stage:
    """One point of the chain base -> SFT -> DPO, as the adapters that are active in it."""

    name: str
    parent: bool
    trained: bool


@dataclass(frozen=True)
class LoadedRun:
    """A run, ready for forward passes. `policy.activate` switches between its stages."""

    opened: Reopened
    tokenizer: ChatTokenizer
    policy: Policy
    stages: tuple[Stage, ...]

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.opened.folder

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.opened.config

    @cached_property
    def method(self) -> Method:
        """See `Reopened.method`; generating and merging need no loss."""
        return self.opened.method()

    def activate(self, stage: Stage) -> None:
        """Make the model that of a stage."""
        self.policy.activate(parent=stage.parent, trained=stage.trained)


@dataclass(frozen=True)
class Reopened:
    """What is known of a run before its rows are read and its model is loaded.

    Attributes:
        placement: the run's precision where this machine has it, else this machine's own.
        moved: why numbers need not be the run's bit for bit, or None.
        elsewhere: the run computed on another device, or on a CPU with another number of threads; None: not known.
        parent: the frozen adapter in the run folder.
        note: takes lines for people.
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

    def data(self) -> tuple[ChatTokenizer, PreparedData]:
        """The run's tokenizer and examples. Those for evaluation are not checked: see `held_out`.

        Raises:
            ConfigError, DataError: they cannot be read, or changed since the run.
        """
        tokenizer, data = prepare_data(self.config)
        if data.report.train.fingerprint != self.manifest["data_sha256"]:
            source, folder = self.config.data.source, self.folder.path
            raise DataError(f"{source}: not the rows that {folder} trained on, so its steps are not known")
        return tokenizer, data

    def held_out(self) -> Sequence[Any]:
        """The examples that the run evaluated on; empty without data.eval_source. Training rows are not checked.

        Raises:
            ConfigError, DataError: they cannot be read, or changed since the run.
        """
        source, folder = self.config.data.eval_source, self.folder.path
        if source is None:
            return []
        data = prepare_data(self.config)[1]
        report = data.report.evaluation
        if report is None or report.fingerprint != self.manifest.get("evaluation_sha256"):
            name = self.config.data.source if source == "holdout" else source
            raise DataError(f"{name}: not the rows that {folder} held out, so nothing says that it never saw them")
        return data.evaluation

    def first_adapter(self) -> Path | None:
        """What the trained adapter began as: a PEFT folder, or None for weights from the seed. Raises ConfigError."""
        return find_adapter(self.config.lora.init_from, "lora.init_from")

    def inputs(self, adapter: Path | None = None) -> Inputs:
        """The inputs that `lowlevel.running.run` had, the rows checked; `adapter` as in `policy`."""
        tokenizer, data = self.data()
        trained, merged = adapter or self.first_adapter(), self.manifest["base"].get("merged_adapter")
        return Inputs(tokenizer, data, self.placement, self.attention, self.parent, trained, merged)

    def policy(self, adapter: Path | None = None, *, training: bool = False) -> Policy:
        """The base with the run's adapters, both checked against the manifest.

        Args:
            adapter: PEFT folder with the trained adapter's weights; None: as the run began.
            training: recompute and offload as the run did; else for forward passes, with everything on the device.

        Raises:
            CheckpointError: another base or frozen adapter than the run's, or one that is damaged.
        """
        if self.parent and adapter_sha256(self.parent) != self.manifest["parent_adapter"]:
            raise CheckpointError(
                f"{self.parent}: not the adapter that this run stands on (its hash is not the manifest's)"
            )
        config = self.config if training else _without_backward(self.config)
        trained = adapter or self.first_adapter()
        policy = load_policy(config, self.placement, self.attention, parent=self.parent, init_from=trained)
        hashes = self.base_hashes(policy)
        if hashes and hashes[0] != hashes[1]:
            name, hint = self.config.model.name, ""
            if self.elsewhere is None and self.config.model.load_in_4bit:
                hint = f"; {ENVIRONMENT}, which says where it was quantised, cannot be read"
            raise CheckpointError(
                f"{self.folder.path}: base {name!r} is not the one that was trained on (hash {hashes[0][:12]}){hint}"
            )
        return policy

    def base_hashes(self, policy: Policy) -> tuple[str, str] | None:
        """The base's SHA-256 as it is loaded here, and as the run had it; None, and a line, where they say nothing.

        The hash is over the tensors that the run computed with: rounded to its dtype, and where they are quantised,
        quantised from the rounded ones. In another dtype the same file gives other tensors; and nested quantisation
        takes means, whose last bits depend on the device and on the number of threads. To tell such bases apart, one
        would have to be loaded a second time, as the run had it, for its hash alone.
        """
        base, here = self.manifest["base"], dtype_name(self.placement.dtype)
        why = f": {self.moved}" if self.moved else ""
        if base["dtype"] != here:
            self.note(f"note: the base is not checked, its hash is one of {base['dtype']} and it is {here} here{why}")
            return None
        found = base_sha256(policy.model)
        if found != base["sha256"] and self.elsewhere and self.config.model.load_in_4bit:
            self.note(f"note: the base is not checked, it was quantised elsewhere, and has another hash here{why}")
            return None
        return found, base["sha256"]

    def method(self) -> Method:
        """The run's method.

        Raises:
            ConfigError: its loss is not registered here, or cannot be imported.
            CheckpointError: the source of its loss changed since the run.
        """
        try:
            spec = run_loss(self.config)
        except ValueError as error:
            raise ConfigError(f"{self.folder.path}: {error}") from None
        was = self.manifest.get("loss_sha256")
        if spec.sha256 != was:
            hashes = f"hash {(spec.sha256 or 'built in')[:12]}, the run's {(was or 'built in')[:12]}"
            raise CheckpointError(f'{self.folder.path}: loss "{spec.name}": its source is not the run\'s ({hashes})')
        return build_method(self.config, self.attention)

    def load(self, adapter: Path | None) -> LoadedRun:
        """The run for forward passes; `adapter` and errors as in `policy`. Reads no rows."""
        tokenizer, policy = load_run_tokenizer(self.config), self.policy(adapter)
        stages = [Stage("base", False, False)]
        if self.parent:
            stages.append(Stage("sft", True, False))
        stages.append(Stage(self.config.method, True, True))
        return LoadedRun(self, tokenizer, policy, tuple(stages))


def reopen(
    run_dir: Path, note: Note = print, *, data: GivenRows | None = None, eval_data: GivenRows | None = None
) -> Reopened:
    """Open a run folder, of a finished, stopped or running run; nothing is written and no lock is taken.

    A run whose rows were given in Python needs them again, as `data` and `eval_data`, where its rows are read.

    Raises:
        ConfigError: not a run folder, or a base that cannot be read.
        CheckpointError: no manifest or a part of one, or no frozen adapter where the manifest names one.
    """
    folder = RunFolder(run_dir)
    config, manifest = with_rows(folder.read_config(), data, eval_data), folder.read_manifest()
    base = manifest.get("base")
    if not (isinstance(base, dict) and NAMED <= manifest.keys() and {"sha256", "dtype"} <= base.keys()):
        raise CheckpointError(f"{folder.path / 'manifest.json'} does not say what the run stands on")
    parent = folder.parent if folder.parent.exists() else None
    if manifest["parent_adapter"] and parent is None:
        raise CheckpointError(f"{folder.parent} is missing: the frozen adapter that this run stands on")
    placement, moved, elsewhere = _placement(folder, config, base["dtype"])
    attention = choose_attention(config.model, load_model_config(config.model), placement)
    return Reopened(folder, config, manifest, placement, moved, elsewhere, attention, parent, note)


def with_rows(config: RunConfig, data: GivenRows | None, eval_data: GivenRows | None) -> RunConfig:
    """The configuration with rows that are given again."""
    given = {key: rows for key, rows in (("source", data), ("eval_source", eval_data)) if rows is not None}
    return config.model_copy(update={"data": config.data.model_copy(update=given)})


def load_run(run_dir: Path, note: Note = print, *, adapter: Path | None = None) -> LoadedRun:
    """A finished run's base and adapters as they were trained, for forward passes.

    Args:
        run_dir: the run folder.
        note: takes lines for people.
        adapter: one of its checkpoints, in the place of the final adapter.

    Raises:
        ConfigError: not a run folder, or not finished.
        CheckpointError: base or parent adapter are not those that the run trained on.
    """
    opened = reopen(run_dir, note)
    trained = adapter or opened.folder.adapter
    if not trained.exists():
        raise ConfigError(f"{run_dir} has no adapter yet; has the run finished?")
    return opened.load(trained)


def step_examples(config: RunConfig, data: PreparedData, step: int, flag: str = "--step") -> list[Any]:
    """The examples of optimizer step `step`, counted from 1 as the log does; `flag` names it in errors.

    Raises:
        ConfigError: the run has no such step.
    """
    order = DataOrder.of(config, len(data.train))
    total = order.total_steps(config.train)
    if not 1 <= step <= total:
        raise ConfigError(f"{flag} {step}: the run has {total} steps")
    return [data.train[i] for i in order.step_rows(step - 1)]


def _placement(folder: RunFolder, config: RunConfig, dtype: str) -> tuple[Placement, str | None, bool | None]:
    """The run's precision where it can be had, why numbers may differ from the run's, and whether it ran elsewhere.

    Where nothing says on what the run computed, the last is None: not a reason to take another base for its own.
    """
    was = _environment(folder, dtype)
    device, precision, threads = was or ("a device that environment.json does not name", None, None)
    try:
        placement = choose_placement(precision if precision in DTYPES else config.train.precision)
    except ConfigError:
        placement = choose_placement("auto")
    on_gpu, own_threads = placement.device.type == "cuda", torch.get_num_threads()
    here = torch.cuda.get_device_name() if on_gpu else "cpu"
    if (device, precision) != (here, placement.precision):
        moved = f"the run computed in {precision} on {device}, this is {placement.precision} on {here}"
        return placement, moved, device != here if was else None
    if on_gpu and not (config.train.deterministic or torch.are_deterministic_algorithms_enabled()):
        return placement, "a GPU adds in no fixed order, unless the run has train.deterministic = true", False
    if not on_gpu and threads not in (None, own_threads):
        return placement, f"the run computed with {threads} threads, this is {own_threads}", True
    return placement, None, False


def _environment(folder: RunFolder, dtype: str) -> tuple[str, str, int | None] | None:
    """Device, precision and threads that the run computed with; None where they cannot be read or are another run's.

    `dtype` is the base's in the manifest.
    """
    try:
        was = json.loads((folder.path / ENVIRONMENT).read_text(encoding="utf-8"))
        device, precision, threads = was["device"], was["precision"], was.get("threads")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not (isinstance(device, str) and isinstance(precision, str) and isinstance(threads, int | None)):
        return None
    if precision in DTYPES and dtype_name(DTYPES[precision]) != dtype:
        return None
    return device, precision, threads


def _without_backward(config: RunConfig) -> RunConfig:
    """The configuration for forward passes alone: they keep no activations, which leaves room for the embeddings.

    Those must lie with the layers: transformers 5.23's `generate` moves its inputs to where the model's first parameter
    is, which is the input embedding, and a layer on a GPU refuses what comes from the host.
    """
    model = config.model.model_copy(update={"embeddings_on_host": False})
    forward = {"gradient_checkpointing": False, "recomputed_layers": None, "offload_activations": False}
    return config.model_copy(update={"model": model, "train": config.train.model_copy(update=forward)})
