"""Everything between a run's [data] section and its examples: read, filter, shuffle, hold out, check, tokenise, report.

Nothing here needs the model, only its two limits, so that bad data stops a run before the model is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from lowlevel.config.given import GIVEN, GivenRows
from lowlevel.config.schema import DataConfig, RunConfig
from lowlevel.data.examples import Built, PreferenceExample, SFTExample, build_examples
from lowlevel.data.filters import apply_filters
from lowlevel.data.messages import BadRow, Normalised, check_columns, normalise
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.report import DataReport, SplitReport, count_warnings, overlap, split_report, tokenizer_report
from lowlevel.data.sources import FILE_SUFFIXES, Row, RowProblem, SourceRows, data_error, read_source, shuffled
from lowlevel.errors import ConfigError, DataError, quoted

Checked = Normalised | RowProblem


@dataclass(frozen=True)
class ModelLimits:
    """What the model's config.json says: rows of the embedding, positions (tokens of a sequence), attention window, and
    positions up to which its rotary angles depend on no other example."""

    vocab_size: int
    max_position_embeddings: int
    window: int | None = None
    short: int | None = None


@dataclass(frozen=True)
class PreparedData:
    """Examples in training order and for evaluation (empty without eval_source), and the report on both."""

    train: list[SFTExample] | list[PreferenceExample]
    evaluation: list[SFTExample] | list[PreferenceExample]
    report: DataReport


@dataclass(frozen=True)
class Selected:
    """Rows of one split after filters, shuffle and limit: in order, checked, unusable ones as problems."""

    source: SourceRows
    rows: list[Checked]


def prepare(config: RunConfig, tokenizer: ChatTokenizer, limits: ModelLimits) -> PreparedData:
    """Read and tokenise what a run trains and evaluates on.

    Raises:
        ConfigError: max_length beyond the model, its attention window or its short rotary factors, a source or column
            that does not exist, a holdout that leaves nothing.
        DataError: unusable rows (unless data.on_bad_row is "skip"), or no usable row at all.
    """
    data = config.data
    if data.max_length > limits.max_position_embeddings:
        limit = limits.max_position_embeddings
        raise ConfigError(f"data.max_length {data.max_length} > model limit {limit}: lower data.max_length")
    if limits.window is not None and data.max_length > limits.window:
        raise ConfigError(
            f"data.max_length {data.max_length} > {limits.window}, the model's attention window, which a packed row "
            "does not have: lower data.max_length"
        )
    if limits.short is not None and data.max_length > limits.short:
        raise ConfigError(
            f"data.max_length {data.max_length} > {limits.short}, up to where the model's longrope takes its short "
            f"factors; a longer example would change them for all of its batch: set data.max_length = {limits.short}"
        )
    selections = _select(data)
    finished = [_build(selected, data, tokenizer, limits.vocab_size) for selected in selections]
    problems = [problem for built, _ in finished for problem in built.problems]
    if problems and data.on_bad_row == "error":
        raise data_error(problems)
    reports = [_report(selected, *done, data, tokenizer) for selected, done in zip(selections, finished, strict=True)]
    train, evaluation = finished[0][0], finished[1][0] if len(finished) > 1 else None
    return PreparedData(
        train=train.examples,
        evaluation=evaluation.examples if evaluation else [],
        report=DataReport(
            format=data.format,
            supervise=data.supervise,
            max_length=data.max_length,
            train=reports[0],
            evaluation=reports[1] if evaluation else None,
            overlap=overlap(train.rows, evaluation.rows) if evaluation else None,
            tokenizer=tokenizer_report(tokenizer),
        ),
    )


def _select(data: DataConfig) -> list[Selected]:
    """The training split, then the evaluation split if there is one."""
    has_splits = isinstance(data.source, str) and not data.source.endswith(FILE_SUFFIXES)
    if data.source == data.eval_source not in ("demo", GIVEN) and not (has_splits and data.split != data.eval_split):
        name = quoted(str(data.source))
        raise ConfigError(f'data.eval_source {name} is what is trained on: name other rows, or "holdout" to keep some')
    source = _filtered(data.source, data.split, data)
    rows = source.rows if data.shuffle_seed is None else shuffled(source.rows, data.shuffle_seed)
    if data.eval_source == "holdout":
        return _with_holdout(source, rows, data)
    train = Selected(source, list(_checked(rows[: data.limit], data)))
    if data.eval_source is None:
        return [train]
    evaluation = _filtered(data.eval_source, "heldout" if data.eval_source == "demo" else data.eval_split, data)
    return [train, Selected(evaluation, list(_checked(evaluation.rows[: data.eval_limit], data)))]


def _with_holdout(source: SourceRows, rows: list[Row], data: DataConfig) -> list[Selected]:
    """The last eval_limit rows for evaluation. Rows with one of their prompts are not trained on.

    A pair on a prompt that was trained on would not test what was learned from other prompts.
    """
    size = data.eval_limit or 0
    if size >= len(rows):
        if source.problems and data.on_bad_row == "error":
            raise data_error(source.problems)
        raise ConfigError(f"data.eval_limit {size} leaves no training rows: {source.name} has {len(rows)}")
    held_out = list(_checked(rows[-size:], data))
    prompts = {row.prompt_digest for row in held_out if isinstance(row, Normalised)}
    others = (
        row for row in _checked(rows[:-size], data) if isinstance(row, RowProblem) or row.prompt_digest not in prompts
    )
    training = list(islice(others, data.limit))
    if not training:
        raise ConfigError(f"data.eval_limit {size} leaves no training rows: every prompt of {source.name} is held out")
    return [Selected(source, training), Selected(SourceRows(f"{source.name} (holdout)", rows[-size:]), held_out)]


def _checked(rows: Iterable[Row], data: DataConfig) -> Iterator[Checked]:
    """Each row as messages, or as the problem that makes it unusable."""
    for row in rows:
        try:
            yield normalise(row, data.format, data.columns)
        except BadRow as bad:
            yield RowProblem(row.where, bad.reason, str(bad))


def _filtered(origin: str | GivenRows, split: str, data: DataConfig) -> SourceRows:
    source = read_source(origin, split, data.format)
    if not source.rows:
        raise data_error(source.problems)
    check_columns(source, data.format, data.columns)
    kept = apply_filters(source, data.filters)
    if not kept.rows and not kept.problems:
        drops = "; ".join(f"{condition} drops {count}" for condition, count in kept.dropped.items())
        raise DataError(f"{kept.name}: no usable rows: {kept.read} of {kept.read} filtered out ({drops})")
    return kept


def _build(
    selected: Selected, data: DataConfig, tokenizer: ChatTokenizer, vocab_size: int
) -> tuple[Built, Counter[str]]:
    """Examples, with all problems in the order of the steps that found them; and all warnings."""
    rows = [row for row in selected.rows if isinstance(row, Normalised)]
    unusable = [row for row in selected.rows if isinstance(row, RowProblem)]
    built = build_examples(rows, data, tokenizer, vocab_size)
    problems = selected.source.problems + unusable + built.problems
    return replace(built, problems=problems), selected.source.warnings + count_warnings(rows, tokenizer)


def _report(
    selected: Selected, built: Built, warnings: Counter[str], data: DataConfig, tokenizer: ChatTokenizer
) -> SplitReport:
    """Raises DataError if no row is left to train on."""
    source = selected.source
    if not built.examples:
        raise DataError(_nothing_left(source.name, built, data))
    return split_report(source.name, source.read, len(selected.rows), source.dropped, built, warnings)


def _nothing_left(name: str, built: Built, data: DataConfig) -> str:
    tried = len(built.too_long) + len(built.problems)
    if not built.problems:
        return f"{name}: no usable rows: {tried} of {tried} longer than max_length {data.max_length}"
    reasons = Counter(problem.reason for problem in [*built.problems, *built.too_long])
    return f"{name}: no usable rows: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
