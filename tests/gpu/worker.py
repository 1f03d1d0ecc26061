"""`python worker.py STEP ARGUMENTS...`: the command line in a process of its own; SIGTERM at the end of step STEP."""

import sys

import pytest
from workspace import stop_at

from lowlevel.cli import main

if __name__ == "__main__":
    if step := int(sys.argv[1]):
        stop_at(pytest.MonkeyPatch(), step)
    sys.exit(main(sys.argv[2:]))
