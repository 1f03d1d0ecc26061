"""Inspecting a run: its rows, the weights to inspect them with, and the records.

The default weights are those before the step; for a row the final adapter, or the newest checkpoint of an unfinished
run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowlevel.checkpoints.checkpoint import checkpoint_at, newest_good, saved, step_of
from lowlevel.config.schema import RunConfig
from lowlevel.data.building import build_examples
from lowlevel.data.mixing import apply_filters, read_parts
from lowlevel.data.prepare import PreparedData, normalised_rows
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.rows import Row, RowProblem
from lowlevel.errors import CheckpointError, ConfigError, DataError
from lowlevel.inspection import labelled, pairs, rewards, sampled, sft
from lowlevel.inspection.example import Example, Inspection, View
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.online import rollouts
from lowlevel.running.reopening import Reopened, kept_rollouts, step_examples
from lowlevel.running.run_folder import RunFolder

METHODS: dict[str, tuple[Callable[..., list[Example]], Callable[..., View]]] = {  # what is shown, and how
    "sft": (sft.inspect_sft, sft.view),
    "dpo": (pairs.inspect_pairs, pairs.view),
    "kto": (labelled.inspect_labelled, labelled.view),
    "reward": (rewards.inspect_rewards, rewards.view),
    **dict.fromkeys(("grpo", "rloo", "ppo"), (sampled.inspect_sampled, sampled.view)),
}


Weights = tuple[Path | None, str]  # a trained adapter (None: as the run initialised it), and its description


def inspect_run(
    opened: Reopened, *, step: int | None = None, example: int | None = None, checkpoint: int | None = None
) -> Inspection:
    """Inspect the examples of an optimizer step, or one data row. Dropout is off.

    Args:
        opened: the run, from `lowlevel.running.reopening.reopen`.
        step: optimizer step, counted from 1 as in the log. Give either `step` or `example`.
        example: data row, as the data report and error messages name it.
        checkpoint: use the weights of the checkpoint after this many updates; 0: the adapter as initialised.

    Raises:
        ConfigError: not exactly one of `step` and `example`, no such step or checkpoint, or nothing saved yet.
        DataError: the row was not trained on, or the data changed since the run.
        CheckpointError: damaged checkpoints and no good one, or a base or adapter that is not the run's.
    """
    if (step is None) == (example is None):
        raise ConfigError(f"inspect: give either a step or an example, got step {step} and example {example}")
    folder, config = opened.folder, opened.config
    adapter, line = _choose_weights(folder, step, checkpoint, opened.note)
    tokenizer, data = opened.data()
    if example is not None and config.sampled:
        raise ConfigError(f"--example: {config.method} samples other completions in each step: give --step")
    if example is not None:
        examples, subject = [example_of_row(config, tokenizer, data, example)], f"row {example}"
    else:
        assert step is not None
        examples, subject = step_examples(config, data, step, run_dir=folder.path), f"step {step}"
    kept = kept_rollouts(config, folder.path, step) if step and config.method == "online_dpo" else []
    examples = rollouts.step_examples(config, kept) if kept else examples
    run = opened.load(adapter, reference=True)
    method = opened.method(data.train)
    inspect, view = METHODS[method.name]
    found = inspect(run.policy, method, examples)
    if config.method == "online_dpo":
        found = sampled.with_groups(found, examples, kept, config.online_dpo)
    return Inspection(
        run=folder.path.resolve().name,
        subject=subject,
        weights=f"{line}; the moving reference as it was then" if run.policy.moving else line,
        logged=logged_loss(folder.read_metrics(), step, config) if step is not None else None,
        pieces=TokenPieces(run.tokenizer),
        method=method,
        view=view(method),
        examples=tuple(found),
    )


def logged_loss(metrics: Sequence[dict[str, Any]], step: int, config: RunConfig) -> str | None:
    """The logged loss of a step as text, with the steps that it is a mean of; None if the step was not logged."""
    steps = [record["step"] for record in metrics if "loss" in record]
    if step not in steps:
        return None
    first = max((other for other in steps if other < step), default=0) + 1
    loss = next(record["loss"] for record in metrics if record["step"] == step and "loss" in record)
    window = "" if first == step else f", the mean of steps {first} to {step}"
    dropout = f", with dropout {config.active_dropout:g}" if config.active_dropout else ""
    return f"logged: {loss:z.6f}{window}{dropout}"


def _choose_weights(
    folder: RunFolder, step: int | None, checkpoint: int | None, warn: Callable[[str], None]
) -> Weights:
    """The weights after `checkpoint` updates (0: initial ones); None: the default for step `step`, or for a row.

    `warn` receives a line for each damaged checkpoint that is skipped.
    """
    if checkpoint == 0 or (checkpoint is None and step == 1):
        return None, f"adapter as initialised{_relation(0, step) or ', before the first step'}"
    if checkpoint is not None:
        try:
            path, _ = checkpoint_at(folder.path, checkpoint, "--checkpoint")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; choose another checkpoint with --checkpoint") from None
        return path, f"{path.name}{_relation(checkpoint, step)}"
    return last_weights(folder, warn) if step is None else _before(folder, step, warn)


def last_weights(folder: RunFolder, warn: Callable[[str], None]) -> Weights:
    """The final adapter, or the newest good checkpoint of an unfinished run; ConfigError if nothing is saved yet."""
    adapter = folder.newest_adapter(warn)
    if adapter is None:
        raise _nothing_saved(folder)
    return adapter, folder.words(adapter)


def _before(folder: RunFolder, step: int, warn: Callable[[str], None]) -> Weights:
    """The newest good checkpoint before a step, or the final adapter if none is left."""
    found = newest_good(folder.path, warn, before=step)
    if found:
        return found[0], f"{found[0].name}{_relation(step_of(found[0]), step)}"
    if folder.adapter.exists():
        return folder.adapter, f"final adapter (no checkpoint at or before step {step - 1} is left)"
    if any(number < step for number in saved(folder.path)):
        raise CheckpointError(
            f"{folder.path}: no usable checkpoint before step {step}; --checkpoint 0 uses the initial weights"
        )
    if later := sorted(saved(folder.path)):
        first = f"its first checkpoint is that of step {later[0]}: add --checkpoint {later[0]}"
        raise ConfigError(f"{folder.path}: {first}, or --checkpoint 0 for the initial weights")
    raise _nothing_saved(folder)


def _nothing_saved(folder: RunFolder) -> ConfigError:
    hint = "set train.save_steps, or wait until the run ends; inspect --checkpoint 0 uses the initial weights"
    return ConfigError(f"{folder.path} has no saved weights yet: {hint}")


def _relation(number: int, step: int | None) -> str:
    """The position of checkpoint `number` relative to the inspected step."""
    if step is None:
        return ""
    if number + 1 == step:
        return f", the weights before step {step}"
    if number < step:
        return f", {step - 1 - number} {'update' if step - number == 2 else 'updates'} before step {step} began"
    return f", already trained on step {step}"


def example_of_row(config: RunConfig, tokenizer: ChatTokenizer, data: PreparedData, row: int) -> Any:
    """The training example of data row `row`.

    Raises DataError: the row was not trained on; the message gives the reason.
    """
    for example in data.train:
        if example.row == row:
            return example
    if config.data.eval_source == "holdout" and any(example.row == row for example in data.evaluation):
        raise DataError(f"row {row} is held out for evaluation, so it was not trained on")
    raise DataError(_why_missing(config, tokenizer, row))


def _why_missing(config: RunConfig, tokenizer: ChatTokenizer, row: int) -> str:
    data = config.data
    parts = read_parts(data, config.method)
    found = next((candidate for part in parts for candidate in part.rows if candidate.id == row), None)
    if found is None:
        names, count = ", ".join(part.name for part in parts), sum(len(part.rows) for part in parts)
        return f"row {row}: {names} has the rows 0 to {count - 1}"
    kept = apply_filters(parts[found.source], [*data.filters, *data.parts[found.source].filters])
    problem = next((problem.message for problem in kept.problems if problem.where == found.where), None)
    if problem is None and all(candidate.id != row for candidate in kept.rows):
        return f"row {row} ({found.where}) was filtered out by data.filters, so it was not trained on"
    problem = problem or _problem(found, config, tokenizer)
    if problem:
        return f"row {row} ({found.where}) was dropped, so it was not trained on: {problem}"
    limits = "the weights of data.sources" if data.parts[0].weight else "the held-out rows"
    limits = f"data.limit = {data.limit}" if data.limit else limits
    return f"row {row} ({found.where}) was left out by {limits}, so it was not trained on"


def _problem(row: Row, config: RunConfig, tokenizer: ChatTokenizer) -> str | None:
    """Why a row gives no example, or None if it gives one."""
    (read,) = normalised_rows([row], config.data)
    if isinstance(read, RowProblem):
        return read.message
    built = build_examples([read], config.data, tokenizer, len(tokenizer.tokenizer))
    return next((problem.message for problem in built.problems), None)
