"""The report as one HTML file that needs no network, in the look of the inspection page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lowlevel.errors import ConfigError
from lowlevel.inspection.figures import plain, signed, typographic
from lowlevel.reporting.charts import chart
from lowlevel.reporting.pairs import PairTables
from lowlevel.reporting.series import Panel


@dataclass(frozen=True)
class Report:
    """What the page says.

    Attributes:
        folder: the run folder as commands name it.
        facts: name and value, in the head.
        tables: of a dpo run with a trace.
        missing: what a trace would add, where there is none.
        tokens: text of token ids in `tables.falls`, where a tokenizer was at hand.
        pages: inspection pages in the run folder, by data row.
    """

    name: str
    folder: str
    facts: Sequence[tuple[str, str]]
    panels: Sequence[Panel]
    tables: PairTables | None
    missing: str | None
    tokens: dict[int, str]
    pages: dict[int, str]


def render(report: Report) -> str:
    """The page as HTML; every text in it is escaped, and its policy allows no script at all."""
    own, look = files("lowlevel.reporting"), files("lowlevel.inspection")
    style = (look / "page.css").read_text(encoding="utf-8") + (own / "report.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"signed": lambda x: typographic(signed(x, 3)), "plain": lambda x: typographic(plain(x, 3))}
    return environment.from_string((own / "report.html").read_text(encoding="utf-8")).render(
        report=report,
        charts=[chart(panel) for panel in report.panels],
        style=Markup(style),  # noqa: S704 - files of this package
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(render(report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
