"""a step or a row of a run, token by token, down to the numbers of the loss"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, not_negative, positive, quiet_console


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
    from lowlevel.inspection.run import inspect_run

    inspect_run(
        options.run_dir,
        console,
        step=options.step,
        example=options.example,
        checkpoint=options.checkpoint,
        html=options.html,
    )
