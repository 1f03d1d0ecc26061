"""The report as one HTML file that needs no network, with the style of the inspection page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowlevel.inspection.page import render_template
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
    """The page as HTML; its policy forbids all scripts."""
    styles = ["inspection/page.css", "reporting/report.css"]
    charts = [chart(panel) for panel in report.panels]
    return render_template("reporting/report.html", styles, report=report, noticed=NOTICED_TEXT, charts=charts)
