"""a step or a row of a run, token by token, down to the numbers of the loss"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, check_target, not_negative, positive, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=positive, metavar="N", help="examples of optimizer step N, from 1")
    text = "data row, as named in the data report and in errors"
    what.add_argument("--example", type=not_negative, metavar="ROW", help=text)
    text = "weights of checkpoint step-K, 0: before training (default: newest before --step; for --example the last)"
    add("--checkpoint", type=not_negative, metavar="K", help=text)
    add("--html", type=Path, metavar="FILE", help="write a page instead of the tables of tokens")


def run(options: Options, overrides: Overrides) -> None:
    check_target("--html", options.html)
    console = quiet_console()
    from lowlevel.inspection.opening import inspect_run
    from lowlevel.inspection.page import write_page
    from lowlevel.inspection.terminal import print_inspection
    from lowlevel.running.progress import lines_to
    from lowlevel.running.reopening import reopen

    opened = reopen(options.run_dir, lines_to(console))
    inspection = inspect_run(opened, step=options.step, example=options.example, checkpoint=options.checkpoint)
    print_inspection(inspection, console, details=options.html is None)
    if options.html:
        write_page(inspection, options.html)
        console.print(f"page written to {options.html}", markup=False)
