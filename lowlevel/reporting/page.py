"""The report as one HTML file that needs no network, with the style of the inspection page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowlevel.inspection.page import render_template
from lowlevel.reporting.displaced import NOTICED_TEXT, SHOWN, DisplacedPairs, PairTables
from lowlevel.reporting.series import chart
from lowlevel.running.plots import Panel
from lowlevel.table import TextTable


@dataclass(frozen=True)
class Report:
    """The contents of the page."""

    name: str
    folder: str  # the run folder, quoted for a shell
    facts: Sequence[tuple[str, str]]  # name and value, in the head
    panels: Sequence[Panel]
    tables: PairTables | None  # of a dpo run with a trace
    missing: str | None  # what a trace would add; None if there is one
    tokens: dict[int, str]  # text of the token ids in `tables.falls`, if the tokenizer could be loaded
    pages: dict[int, str]  # links to inspection pages in the run folder, by data row
    measured: Sequence[TextTable] = ()  # of lowlevel eval and compare --probe
    displaced: DisplacedPairs | None = None  # the tokens that gained the probability of displaced pairs, if requested

    @property
    def command(self) -> str:
        """The command that shows which tokens gained the probability of displaced pairs."""
        return f"lowlevel report {self.folder} --displaced {SHOWN}"


def render(report: Report) -> str:
    """The page as HTML; its policy forbids all scripts."""
    styles = ["inspection/page.css", "reporting/report.css"]
    charts = [chart(panel) for panel in report.panels]
    return render_template("reporting/report.html", styles, report=report, noticed=NOTICED_TEXT, charts=charts)
