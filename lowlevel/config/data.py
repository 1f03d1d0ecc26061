"""The section [data] of a run file: where the rows come from, and how they become tokens."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from lowlevel.config.given import GIVEN, Source
from lowlevel.config.section import Above, Length, Names, OptionalLocation, Positive, Section, Seed


def _iso_date(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise PydanticCustomError("date", "a date like 2024-07-26") from None
    return text


Date = Annotated[str, AfterValidator(_iso_date)]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "question", "preference", "hh", "orca", "prompt"]


class Filter(Section):
    """Keep the rows for which `column op value` holds."""

    column: str
    op: Literal["==", "!=", ">", ">=", "<", "<=", "in", "not in"]
    value: str | int | float | bool | list[str | int | float | bool]


class DataSource(Section):
    """One of several sources: its rows, and their share of the training rows."""

    source: Source
    split: str = "train"
    weight: Above | None = None
    format: Format | None = None  # default: data.format
    filters: tuple[Filter, ...] = Field((), strict=False)  # of this source alone, after data.filters


class DataConfig(Section):
    """Where the rows come from and how they become tokens."""

    source: Source = Field("demo", description='file (JSON lines, JSON array, parquet), hub name, or "demo"')
    split: str = Field("train", description="split of a hub data set")
    sources: tuple[DataSource, ...] = Field(
        (), strict=False, description="several sources instead of one: source, split, weight, format, filters"
    )
    shuffle_seed: Seed | None = Field(None, description="shuffle the rows as datasets.shuffle(seed) does, before limit")
    limit: Positive | None = Field(None, description="rows to keep after shuffling and filtering")
    format: Format = Field(
        "auto", description="format of the rows (lowlevel/data/README.md); auto: the one that fits their columns"
    )
    columns: Names = Field((), description="numeric columns of a row that a custom loss receives")
    weight_column: str | None = Field(None, description="sft: numeric column with the weight of a row in the loss")
    filters: tuple[Filter, ...] = Field((), strict=False, description="conditions on a row: column, op, value")
    chat_template_from: OptionalLocation = Field(None, description="model or .jinja file whose chat template is used")
    template_date: Date = Field("2024-07-26", description="date given to chat templates that print today's date")
    supervise: Literal["assistant", "all"] = Field("assistant", description="tokens in the loss: replies, or all")
    max_length: Length = Field(512, description="most tokens of prompt and completion; demo base: 256")
    max_prompt_length: Positive | None = Field(None, description="dpo: most tokens of a prompt; the start is cut off")
    packing: bool = Field(True, description="put several examples into one row; the loss stays the same")
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at an unusable row, or skip it")
    eval_source: Source | None = Field(None, description='evaluation rows; "holdout": rows of source not trained on')
    eval_split: str = Field("test", description="split of a hub data set for evaluation")
    eval_limit: Positive | None = Field(None, description="rows to evaluate on")

    @property
    def numbers(self) -> Mapping[str, str]:
        """The numeric columns that are read, each with the key that names it."""
        weight = {} if self.weight_column is None else {self.weight_column: "data.weight_column"}
        return weight | dict.fromkeys(self.columns, "data.columns")

    @property
    def parts(self) -> tuple[DataSource, ...]:
        """The sources of the training rows, one or several."""
        return self.sources or (DataSource(source=self.source, split=self.split),)

    @property
    def names(self) -> str:
        """The sources for a message."""
        return ", ".join(str(part.source) for part in self.parts)

    @property
    def given(self) -> bool:
        """Whether rows were given in Python: no command can read them again."""
        return GIVEN in (str(self.source), str(self.eval_source))
