"""Another process for test_resume.py: runs the jobs given on standard input and prints what each one said, as JSON."""

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from lowlevel.config.file import load_config
from lowlevel.running.run import run_training

if __name__ == "__main__":
    said = []
    for job in json.load(sys.stdin):
        text = io.StringIO()
        run_training(load_config(Path(job["config"])), Console(file=text, width=1000), resume=job["resume"])
        said.append(text.getvalue())
    print(json.dumps(said))
