"""Paths in run files and quoted flags, where no shell has written out `~` and `$NAME`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError


def expanded(value: object) -> object:
    """A path as a shell would pass it; what exists as it is written stays, and so do names and other values."""
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str) or os.path.exists(value):
        return value
    path = os.path.expandvars(os.path.expanduser(value))
    if re.search(r"\$\{?[A-Za-z_]", path):
        raise PydanticCustomError("path", "a path whose variables are set in the environment")
    return path


Location = Annotated[str, BeforeValidator(expanded)]
OptionalLocation = Annotated[str | None, BeforeValidator(expanded)]
