"""`lowlevel report --displaced N`: the pairs that fell farthest below their reference, under the run's weights."""

from __future__ import annotations

from collections.abc import Callable

from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.inspection import inspect_pairs
from lowlevel.inspection.opening import example_of_row, last_weights
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.methods.dpo import DPO
from lowlevel.reporting.displaced import DisplacedPairs, displaced_pairs
from lowlevel.reporting.pairs import PairTables
from lowlevel.running.reopening import reopen, step_examples
from lowlevel.running.run_folder import RunFolder


def look_at_displaced(
    folder: RunFolder, config: RunConfig, tables: PairTables | None, limit: int, warn: Callable[[str], None]
) -> DisplacedPairs:
    """Which tokens took the probability of up to `limit` displaced pairs, under the final or the newest good weights.

    Args:
        folder: of a dpo run.
        config: its own.
        tables: its trace, which says which pairs fell; without one, those of the last logged step are looked at.
        limit: pairs.
        warn: told of damaged checkpoints, and of a base that cannot be checked.

    Raises:
        ConfigError: an sft run, or nothing saved yet.
        DataError: data that changed since the run.
        CheckpointError: no good checkpoint, or a base or adapter that is not the run's.
    """
    if config.method != "dpo":
        raise ConfigError(
            f"--displaced: {folder.path} is an sft run; only the pairs of a dpo run have a reference to fall below"
        )
    weights = last_weights(folder, warn)
    opened = reopen(folder.path, warn)
    tokenizer, data = opened.data()
    if tables is None:
        step = max(record["step"] for record in folder.read_metrics())
        examples, origin = step_examples(config, data, step), f"of step {step}"
    else:
        rows = [row["row"] for row in tables.lowest[:limit]]
        examples = [example_of_row(config, tokenizer, data, row) for row in rows]
        origin = f"with the lowest chosen log-ratios of steps {tables.first} to {tables.last}"
    run = opened.load(weights.adapter)
    assert isinstance(run.method, DPO)
    records = inspect_pairs(run.policy, run.method, examples)
    return displaced_pairs(records, TokenPieces(run.tokenizer), weights=weights.line, origin=origin, limit=limit)
