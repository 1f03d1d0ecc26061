"""Test helpers are imported as `helpers`: with importlib import mode no test folder is on the path by itself."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
