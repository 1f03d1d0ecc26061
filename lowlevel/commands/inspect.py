"""a step or a row of a run, token by token, down to the numbers of the loss"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, not_negative, positive, quiet_console
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=positive, metavar="N", help="examples of optimizer step N, from 1")
    what.add_argument(
        "--example", type=not_negative, metavar="ROW", help="data row, as named in the data report and in errors"
    )
    parser.add_argument(
        "--checkpoint",
        type=not_negative,
        metavar="K",
        help="weights of checkpoint step-K; 0: before the first step (default: for a step, the newest checkpoint "
        "before it; for a row, the final adapter)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of the tables of tokens")


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    from lowlevel.inspection.opening import inspect_run
    from lowlevel.inspection.page import write_page
    from lowlevel.inspection.terminal import print_inspection
    from lowlevel.running.progress import lines_to
    from lowlevel.running.reopening import reopen

    html = options.html
    if html and not html.parent.is_dir():
        raise ConfigError(f"--html {html}: no such folder")
    opened = reopen(options.run_dir, lines_to(console))
    inspection = inspect_run(opened, step=options.step, example=options.example, checkpoint=options.checkpoint)
    print_inspection(inspection, console, details=html is None)
    if html:
        write_page(inspection, html)
        console.print(f"page written to {html}", markup=False)
