"""The programs that worked out the reference numbers can be imported by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "references"))
