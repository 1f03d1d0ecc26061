"""A table of a run file, and the types of its values."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

LARGEST = 2**31 - 1  # counts are also tensors' sizes and int32 indices
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Length = Annotated[int, Field(gt=1, le=LARGEST)]
Batch = Annotated[int, Field(gt=0, le=65_536)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = int | Annotated[float, Field(allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Above = Annotated[Finite, Field(gt=0)]


def as_list(value: Any) -> Any:
    """A text as a list: names between commas; "none", as other programs say it, is none."""
    if not isinstance(value, str):
        return value
    return [] if value == "none" else [name.strip() for name in value.split(",")]


def as_sum(value: Any) -> Any:
    """TRL's list of losses as their sum."""
    names = re.findall(r"[\w:.]+", value) if isinstance(value, str) and value.startswith("[") else value
    return " + ".join(map(str, names)) if isinstance(names, list | tuple) else value


def as_numbers(value: Any) -> Any:
    """A number, or a text with numbers between commas, as a list; pydantic refuses parts that are none."""
    if not isinstance(value, str | int | float):
        return value
    numbers: list[Any] = value.split(",") if isinstance(value, str) else [value]
    for place, text in enumerate(numbers):
        with contextlib.suppress(ValueError, OverflowError):
            numbers[place] = float(text)
    return numbers


Numbers = Annotated[tuple[Finite, ...], Field(strict=False), BeforeValidator(as_numbers)]
Names = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)]


def expanded(value: object) -> object:
    """A path as a shell passes it, with `~` and `$NAME` written out; what exists as written, and other values, stay."""
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str) or os.path.exists(value):
        return value
    path = os.path.expandvars(os.path.expanduser(value))
    if re.search(r"\$\{?[A-Za-z_]", path):
        raise PydanticCustomError("path", "a path whose variables are set in the environment")
    return path


Location = Annotated[str, BeforeValidator(expanded)]
OptionalLocation = Annotated[str | None, BeforeValidator(expanded)]


class Section(BaseModel):
    """A table of the run file: frozen, strictly typed, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
