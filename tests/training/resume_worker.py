"""Another process for test_resume.py: runs the jobs of one JSON file and writes what each one said to another.

A job that is no resume is run as a command, which prints to standard output.
"""

import io
import json
import sys
import time
from pathlib import Path

time.time = lambda: -1e6

from rich.console import Console  # noqa: E402

from lowlevel.cli import main  # noqa: E402
from lowlevel.config.file import load_config  # noqa: E402
from lowlevel.running.training import run_training  # noqa: E402

if __name__ == "__main__":
    jobs, printed = map(Path, sys.argv[1:])
    said = []
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        text = io.StringIO()
        if job["resume"]:
            run_training(load_config(Path(job["config"])), Console(file=text, width=1000), resume=True)
        elif main(["sft", job["config"]]):
            sys.exit(1)
        said.append(text.getvalue())
    printed.write_text(json.dumps(said))
