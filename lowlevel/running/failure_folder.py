"""`failure/` in a run folder: what was found when a loss, training or held out, or a gradient was not finite.

failure/failure.json                step, data rows, loss scales tried, the first module, and how to replay the step
failure/micro-batch.safetensors     the micro-batch in which it was found
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from lowlevel.durable import replaced_folder, write_json
from lowlevel.errors import NonFiniteError, one_line
from lowlevel.methods import Method
from lowlevel.model.policy import Policy
from lowlevel.running.forensics import FailureReport, examine_error


def write_failure(report: FailureReport, run_dir: Path) -> Path:
    """`failure/` in a run folder, in the place of an older one: all of it or nothing."""
    target = run_dir / "failure"
    with replaced_folder(target) as folder:
        write_json(folder / "failure.json", report.to_json(run_dir))
        if report.batch is not None:
            tensors = {name: tensor.contiguous() for name, tensor in report.batch.tensors().items()}
            save_file(tensors, folder / "micro-batch.safetensors")
    return target


def explained(error: NonFiniteError, policy: Policy, method: Method, run_dir: Path) -> NonFiniteError:
    """The error, its line ending with what was found and where it is written; whatever happens, an error to raise."""
    report = examine_error(error, policy, method)
    try:
        end = f"{report.sentence}; see {write_failure(report, run_dir)}"
    except Exception as problem:  # a full disk must not hide what stopped the run
        end = f"{report.sentence}; no report written ({one_line(problem)})"
    return NonFiniteError(f"{error}; {end}")


@contextmanager
def explaining(policy: Policy, method: Method, run_dir: Path) -> Iterator[None]:
    """A NonFiniteError inside says more when it leaves, and `failure/` is written."""
    try:
        yield
    except NonFiniteError as error:
        raise explained(error, policy, method, run_dir) from None
