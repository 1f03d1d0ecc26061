"""time of whole steps, and of each phase of a step; trains nothing"""

from pathlib import Path

from lowlevel.commands.common import (
    Options,
    Overrides,
    Parser,
    add_run_file,
    cap_gpu_memory,
    positive,
    quiet_console,
    read_any_run,
)


def add_arguments(parser: Parser) -> None:
    add_run_file(parser)
    parser.add_argument(
        "--steps", type=positive, default=10, metavar="N", help="steps to measure, after 3 more (default: 10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result and every step to this file")


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    config = read_any_run(options, overrides, console)
    cap_gpu_memory(options)
    from lowlevel.timing.report import time_run

    time_run(config, console, steps=options.steps, json_file=options.json)
