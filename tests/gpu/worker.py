"""`python worker.py STEP ARGUMENTS...`: the command line in a process of its own; SIGTERM at the end of step STEP."""

import os
import signal
import sys

import pytest
from workspace import at_step

from lowlevel.cli import main

if __name__ == "__main__":
    if step := int(sys.argv[1]):
        at_step(pytest.MonkeyPatch(), step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.exit(main(sys.argv[2:]))
