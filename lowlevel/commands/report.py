"""a run as one page, RUN_DIR/report.html: curves, best and worst pairs, alarms; and the charts as PNG"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, positive, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR")
    add("--compare", type=Path, nargs="+", default=[], metavar="RUN_DIR", help="draw these runs into the same charts")
    text = "load the model: of the N chosen completions that lost most probability, list which tokens gained it"
    add("--displaced", type=positive, metavar="N", help=text)


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    from lowlevel.reporting.report import report_run

    report_run(options.run_dir, console, compare=options.compare, displaced=options.displaced)
