"""The report as one HTML file that needs no network, with the style of the inspection page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lowlevel.durable import write_text
from lowlevel.errors import ConfigError
from lowlevel.inspection.figures import plain, signed, typographic
from lowlevel.inspection.page import inked
from lowlevel.reporting.charts import chart
from lowlevel.reporting.displaced import NOTICED_TEXT, DisplacedPairs
from lowlevel.reporting.pairs import SHOWN, PairTables
from lowlevel.running.plots import Panel


@dataclass(frozen=True)
class Report:
    """The contents of the page.

    Attributes:
        folder: the run folder, quoted for a shell.
        facts: name and value, in the head.
        tables: of a dpo run with a trace.
        missing: what a trace would add; None if there is one.
        tokens: text of the token ids in `tables.falls`, if the tokenizer could be loaded.
        pages: links to inspection pages in the run folder, by data row.
        displaced: the tokens that gained the probability of displaced pairs, if requested.
    """

    name: str
    folder: str
    facts: Sequence[tuple[str, str]]
    panels: Sequence[Panel]
    tables: PairTables | None
    missing: str | None
    tokens: dict[int, str]
    pages: dict[int, str]
    displaced: DisplacedPairs | None = None

    @property
    def command(self) -> str:
        """The command that shows which tokens gained the probability of displaced pairs."""
        return f"lowlevel report {self.folder} --displaced {SHOWN}"


def render(report: Report) -> str:
    """The page as HTML; every text is escaped, and the page's policy forbids all scripts."""
    own, look = files("lowlevel.reporting"), files("lowlevel.inspection")
    style = (look / "page.css").read_text(encoding="utf-8") + (own / "report.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"signed": _signed, "plain": _plain, "typographic": typographic, "inked": inked}
    return environment.from_string((own / "report.html").read_text(encoding="utf-8")).render(
        report=report,
        noticed=NOTICED_TEXT,
        charts=[chart(panel) for panel in report.panels],
        style=Markup(style),  # noqa: S704 - files of this package
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page; the file is replaced atomically.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_text(path, render(report))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _signed(value: float) -> str:
    return typographic(signed(value, 3))


def _plain(value: float) -> str:
    return typographic(plain(value, 3))
