"""The example that was made of a data row, or why there is none."""

from __future__ import annotations

from typing import Any

from lowlevel.config.schema import RunConfig
from lowlevel.data.examples import build_examples
from lowlevel.data.filters import apply_filters
from lowlevel.data.messages import BadRow, normalise
from lowlevel.data.prepare import PreparedData
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.sources import Row, read_source
from lowlevel.errors import DataError


def example_of_row(config: RunConfig, tokenizer: ChatTokenizer, data: PreparedData, row: int) -> Any:
    """The training example made from data row `row`.

    Raises:
        DataError: that row is not trained on, and why.
    """
    for example in data.train:
        if example.row == row:
            return example
    if config.data.eval_source == "holdout" and any(example.row == row for example in data.evaluation):
        raise DataError(f"row {row} is held out for evaluation: inspect takes the rows that were trained on")
    raise DataError(_why_missing(config, tokenizer, row))


def _why_missing(config: RunConfig, tokenizer: ChatTokenizer, row: int) -> str:
    data = config.data
    source = read_source(data.source, data.split, data.format)
    found = next((candidate for candidate in source.rows if candidate.id == row), None)
    if found is None:
        return f"row {row}: {source.name} has the rows 0 to {len(source.rows) - 1}"
    kept = apply_filters(source, data.filters)
    problem = next((problem.message for problem in kept.problems if problem.where == found.where), None)
    if problem is None and all(candidate.id != row for candidate in kept.rows):
        return f"row {row} ({found.where}) was filtered out by data.filters, so it was not trained on"
    problem = problem or _problem(found, config, tokenizer)
    if problem:
        return f"row {row} ({found.where}) was dropped, so it was not trained on: {problem}"
    limits = f"data.limit = {data.limit}" if data.limit else "the held-out rows"
    return f"row {row} ({found.where}) was left out by {limits}, so it was not trained on"


def _problem(row: Row, config: RunConfig, tokenizer: ChatTokenizer) -> str | None:
    """Why a row gives no example, or None where it gives one."""
    try:
        normalised = normalise(row, config.data.format, config.data.columns)
    except BadRow as bad:
        return str(bad)
    built = build_examples([normalised], config.data, tokenizer, tokenizer.vocab_size)
    return next((problem.message for problem in [*built.problems, *built.too_long]), None)
