"""Runs jobs in processes of their own: a tool that fails takes nothing with it, and memory starts empty each time."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cases import FIELDS, WORKERS, Case, Job

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Runner:
    """Settings of a series of jobs."""

    out: Path  # logs, scratch, results
    steps: int
    warmup: int
    cap_gib: float
    timeout: float  # seconds a case
    sites: dict[str, Path] = field(default_factory=dict)  # tool -> its Python, or a folder of packages
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def run(self, case: Case, workload: Path, *, shape: str) -> dict[str, Any]:
        """Measure one case and return its row; a case that fails has a row that says why."""
        folder = self.out / "jobs" / case.name
        folder.mkdir(parents=True, exist_ok=True)
        result = (folder / "result.json").resolve()
        result.unlink(missing_ok=True)
        scratch = (self.out / "scratch").resolve()
        scratch.mkdir(exist_ok=True)
        job = Job(case, str(workload.resolve()), str(scratch), str(result), self.steps, self.warmup, self.cap_gib)
        job.write(folder / "job.json")
        began = time.perf_counter()
        with open(folder / "log", "w", encoding="utf-8") as log:
            ended = self._spawn(case.tool, folder / "job.json", scratch, log)
        if result.exists():
            row = json.loads(result.read_text(encoding="utf-8"))
        else:
            row = {**case.identity, "status": f"failed: {ended}: {last_line(folder / 'log')}"}
        return {
            **row,
            "shape": shape,
            "case_seconds": round(time.perf_counter() - began, 1),
            "commit": commit(),
            "cap_gib": self.cap_gib,
            "started": self.started,
        }

    def _spawn(self, tool: str, job: Path, cwd: Path, log: Any) -> str:
        """Run a worker to its end, or to its time limit; returns how it ended."""
        python, environment = self._environment(tool)
        process = subprocess.Popen(
            [python, "-m", WORKERS[tool], str(job.resolve())],
            cwd=cwd,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # compiler and data workers end with it
        )
        try:
            return f"exit code {process.wait(self.timeout)}"
        except subprocess.TimeoutExpired:
            return f"no result in {self.timeout:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _environment(self, tool: str) -> tuple[str, dict[str, str]]:
        site = self.sites.get(tool)
        paths = [str(ROOT)] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
        python = sys.executable
        if site is not None and site.is_dir():
            paths.insert(0, str(site.resolve()))
        elif site is not None:
            python = str(site)
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}
        return python, {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def parse_sites(texts: Sequence[str]) -> dict[str, Path]:
    """`TOOL=PATH` flags. Raises SystemExit for anything else."""
    pairs = [text.partition("=") for text in texts]
    for tool, _, path in pairs:
        if tool not in WORKERS or not Path(path).exists():
            raise SystemExit(f"--site {tool}={path}: expected TOOL=PATH, a tool of {', '.join(WORKERS)} and its Python "
                             "or a folder of packages")  # fmt: skip
    return {tool: Path(path) for tool, _, path in pairs}


def commit() -> str:
    """This checkout's commit; LOWLEVEL_COMMIT where there is no git."""
    if named := os.environ.get("LOWLEVEL_COMMIT"):
        return named
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return found.stdout.strip() or "unknown"


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(no output)"


def write_table(path: Path, rows: Sequence[dict[str, Any]], fields: Sequence[str] = FIELDS) -> None:
    """Write rows as CSV in one go, so that the file is whole at any moment."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_tables(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Rows of several CSVs of step.py; a case's last row that has numbers stands for it, or its last row."""
    rows: dict[str, dict[str, str]] = {}
    for row in (row for path in paths for row in read_table(path)):
        if row["status"] == "ok" or rows.get(row["case"], row)["status"] != "ok":
            rows[row["case"]] = row
    return list(rows.values())
