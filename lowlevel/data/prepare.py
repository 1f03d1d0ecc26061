"""From a run's [data] section to its examples: read, filter, shuffle, hold out, check, tokenise, report.

This needs only limits from the model's config.json, so bad data stops a run before the model is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lowlevel.config.data import DataConfig
from lowlevel.config.given import GIVEN
from lowlevel.config.schema import RunConfig
from lowlevel.data.building import Built, build_examples
from lowlevel.data.examples import PreferenceExample, PromptExample, SFTExample
from lowlevel.data.messages import Normalised, normalise
from lowlevel.data.mixing import evaluation_rows, training_rows
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.report import DataReport, SplitReport, count_warnings, split_report, tokenizer_report
from lowlevel.data.rows import Row, RowProblem, SourceRows, data_error
from lowlevel.data.texts import BadRow
from lowlevel.data.truncation import truncation
from lowlevel.errors import ConfigError, DataError, quoted


@dataclass(frozen=True)
class ModelLimits:
    """Limits from the model's config.json, in tokens of a sequence."""

    vocab_size: int  # rows of the embedding
    max_position_embeddings: int
    window: int | None = None  # of the attention, if there is one
    short: int | None = None  # with longrope's short factors; a longer sequence changes them for its whole batch

    @property
    def longest(self) -> int:
        """The least of these limits."""
        return min(length for length in (self.max_position_embeddings, self.window, self.short) if length is not None)


@dataclass(frozen=True)
class PreparedData:
    """Examples in training order and for evaluation (empty without eval_source), and the report on both."""

    train: list[SFTExample] | list[PreferenceExample] | list[PromptExample]
    evaluation: list[SFTExample] | list[PreferenceExample] | list[PromptExample]
    report: DataReport


Checked = list[Normalised | RowProblem]  # rows of a split after filters, shuffle and limit, in training order


def prepare(config: RunConfig, tokenizer: ChatTokenizer, limits: ModelLimits) -> PreparedData:
    """Read and tokenise the rows that a run trains and evaluates on.

    Raises:
        ConfigError: max_length is beyond a limit, a source or column does not exist, or a holdout leaves no rows.
        DataError: unusable rows (unless data.on_bad_row is "skip"), or no usable row at all.
    """
    data = config.data
    _check_length(data.max_length, limits)
    selections = _select(data, config.method)
    room = config.sampled.max_completion_length if config.sampled else None
    splits = [_build(*selected, data, tokenizer, limits.vocab_size, room) for selected in selections]
    problems = [problem for built in splits for problem in built.unusable]
    if problems and data.on_bad_row == "error":
        raise data_error(problems)
    reports = [_report(*selected, built, data, limits) for selected, built in zip(selections, splits, strict=True)]
    train, evaluation = splits[0], splits[1] if len(splits) > 1 else None
    prompts = {row.prompt_digest for row in train.rows}
    return PreparedData(
        train=train.examples,
        evaluation=evaluation.examples if evaluation else [],
        report=DataReport(
            format=", ".join(dict.fromkeys(row.row.format.name for row in train.rows)),
            supervise=data.supervise,
            max_length=data.max_length,
            train=reports[0],
            evaluation=reports[1] if evaluation else None,
            overlap=sum(row.prompt_digest in prompts for row in evaluation.rows) if evaluation else None,
            tokenizer=tokenizer_report(tokenizer),
        ),
    )


def _check_length(length: int, limits: ModelLimits) -> None:
    if length > (limit := limits.max_position_embeddings):
        raise ConfigError(f"data.max_length {length} > model limit {limit}: lower data.max_length")
    if limits.window is not None and length > limits.window:
        reason = "the model's attention window, which packed rows do not apply"
        raise ConfigError(f"data.max_length {length} > {limits.window}, {reason}: lower data.max_length")
    if limits.short is not None and length > limits.short:
        reason = "the longest sequence with longrope's short factors; a longer one would change its whole batch"
        raise ConfigError(f"data.max_length {length} > {limits.short}, {reason}: set data.max_length = {limits.short}")


def _select(data: DataConfig, method: str) -> list[tuple[SourceRows, Checked]]:
    """The training split, then the evaluation split if there is one."""
    other = data.eval_source if data.eval_source not in ("demo", GIVEN) else None
    for part in data.parts:
        has_splits = isinstance(other, str) and not Path(other).is_file()
        if part.source == other and not (has_splits and part.split != data.eval_split):
            name = quoted(str(other))
            raise ConfigError(f'data.eval_source {name} is also the training source: name other rows, or "holdout"')
    source = training_rows(data, method)
    if data.eval_source == "holdout":
        return _with_holdout(source, data)
    train = source, list(normalised_rows(source.rows[: data.limit], data))
    if data.eval_source is None:
        return [train]
    split = "heldout" if data.eval_source == "demo" else data.eval_split
    evaluation = evaluation_rows(data.eval_source, split, data, method)
    return [train, (evaluation, list(normalised_rows(evaluation.rows[: data.eval_limit], data)))]


def _with_holdout(source: SourceRows, data: DataConfig) -> list[tuple[SourceRows, Checked]]:
    """Keep the last eval_limit rows for evaluation, and leave rows with one of their prompts out of training.

    Evaluation on a prompt that was trained on would not test what was learned from other prompts.
    """
    rows, size = source.rows, data.eval_limit or 0
    if size >= len(rows):
        if source.problems and data.on_bad_row == "error":
            raise data_error(source.problems)
        raise ConfigError(f"data.eval_limit {size} leaves no training rows: {source.name} has {len(rows)}")
    held_out = list(normalised_rows(rows[-size:], data))
    prompts = {row.prompt_digest for row in held_out if isinstance(row, Normalised)}
    rest = normalised_rows(rows[:-size], data)
    others = (row for row in rest if isinstance(row, RowProblem) or row.prompt_digest not in prompts)
    training = list(islice(others, data.limit))
    if not training:
        raise ConfigError(f"data.eval_limit {size} leaves no training rows: every prompt of {source.name} is held out")
    holdout = SourceRows(f"{source.name} (holdout)", rows[-size:], parts=source.parts)
    return [(source, training), (holdout, held_out)]


def normalised_rows(rows: Iterable[Row], data: DataConfig) -> Iterator[Normalised | RowProblem]:
    """Normalise each row; an unusable one becomes a problem."""
    for row in rows:
        try:
            yield normalise(row, data.columns, data.weight_column)
        except BadRow as bad:
            yield RowProblem(row.where, bad.reason, str(bad))


def _build(
    source: SourceRows, checked: Checked, data: DataConfig, tokenizer: ChatTokenizer, vocab_size: int, room: int | None
) -> Built:
    """Examples with all problems and warnings, those of reading first."""
    rows = [row for row in checked if isinstance(row, Normalised)]
    unusable = [row for row in checked if isinstance(row, RowProblem)]
    built = build_examples(rows, data, tokenizer, vocab_size, room)
    warnings = source.warnings + count_warnings(rows, tokenizer) + built.warnings
    return replace(built, problems=source.problems + unusable + built.problems, warnings=warnings)


def _report(source: SourceRows, checked: Checked, built: Built, data: DataConfig, limits: ModelLimits) -> SplitReport:
    """Raises DataError if no row is left to train on."""
    if built.examples:
        cut = truncation(built.sizes, data, limits.longest) if built.sizes else None
        return replace(split_report(source, len(checked), built), truncation=cut)
    reasons, total = Counter(problem.reason for problem in built.problems), len(built.problems)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if not built.unusable:
        counts = f"{total} of {total} longer than max_length {data.max_length}"
        if any(isinstance(row, Normalised) and row.row.format.method == "grpo" for row in checked):  # less than it
            counts += f"; {built.problems[0].where}: {built.problems[0].message}"
    raise DataError(f"{source.name}: no usable rows: {counts}")
