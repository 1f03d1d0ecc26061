"""time of whole steps, and of each phase of a step; trains nothing"""

from pathlib import Path

from lowlevel.commands import common
from lowlevel.commands.common import Options, Overrides, Parser


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    common.add_run_file(parser)
    add("--steps", type=common.positive, default=10, metavar="N", help="steps to measure, after 3 more (default: 10)")
    add("--json", type=Path, metavar="FILE", help="write the result and every step to this file")


def run(options: Options, overrides: Overrides) -> None:
    common.check_target("--json", options.json)
    console = common.quiet_console()
    config = common.read_any_run(options, overrides, console)
    common.cap_gpu_memory(options)
    from lowlevel.timing.report import time_run

    time_run(config, console, steps=options.steps, json_file=options.json)
