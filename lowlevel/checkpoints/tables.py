"""Parquet files of a trace and of rollouts: atomic, named by their steps, deleted after the step of a resume."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowlevel.durable import write_bytes
from lowlevel.errors import CheckpointError
from lowlevel.losses.token_logps import STATISTICS

if TYPE_CHECKING:
    import pyarrow as pa

_NAME = re.compile(r"(pairs|examples|steps|rollouts)-(\d{8})-(\d{8})\.parquet")


def write_table(folder: Path, kind: str, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write the rows of some steps as one parquet file, atomically.

    Args:
        folder: the run's trace or rollouts folder.
        kind: "pairs", "examples", "steps" or "rollouts".
        columns: values by column; "step" ascends.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    steps = columns["step"]
    path = folder / f"{kind}-{steps[0]:08d}-{steps[-1]:08d}.parquet"
    types = {} if kind == "rollouts" else {name: _type(name) for name in columns}  # those are the values' own
    content = pa.BufferOutputStream()
    pq.write_table(pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()}), content)
    folder.mkdir(exist_ok=True)
    write_bytes(path, content.getvalue().to_pybytes())


def drop_after(folder: Path, step: int) -> None:
    """Delete the files of steps after `step`, which a resumed run repeats, and temporary files.

    A checkpoint is written after all rows before it, so every file lies on one side of it.
    """
    for path in folder.glob(".tmp-*"):
        path.unlink()
    for path in folder.glob("*.parquet"):
        found = _NAME.fullmatch(path.name)
        if found and int(found[3]) > step:
            path.unlink()


def read_table(folder: Path, kind: str, step: int | None = None) -> pa.Table | None:
    """All rows of a kind, by step, or those of one step; None if there are none.

    Raises:
        CheckpointError: a file that is not valid parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in sorted(folder.glob(f"{kind}-*.parquet")):
        first, last = steps_of(path)
        if step is None or first <= step <= last:
            try:
                tables.append(pq.read_table(path, filters=None if step is None else [("step", "==", step)]))
            except (OSError, pa.ArrowException) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
    return pa.concat_tables(tables, promote_options="default") if tables else None  # trace.level may change on resume


def steps_of(path: Path) -> tuple[int, int]:
    """The first and the last step of a file."""
    first, last = path.stem.split("-")[1:]
    return int(first), int(last)


def _type(name: str) -> pa.DataType:
    """The type of a trace's column, so that all files of a kind have the same; fp32 stays fp32."""
    import pyarrow as pa

    if name.startswith("metrics/"):
        return pa.float32()
    if name.endswith("token_ids"):
        return pa.list_(pa.int32())
    if name.endswith(("token_logps", "token_losses", "layer_norms", *STATISTICS)):
        return pa.list_(pa.float32())
    whole = name in ("step", "row", "micro_batch", "pairs", "tokens", "examples") or name.endswith("length")
    return pa.int64() if whole else pa.float64() if name == "loss_scale" else pa.float32()
