"""check this machine before a run, one line per check; exit code 1 if a run would fail"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, check_target, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path(), metavar="DIR", help="where runs would be written (default: here)")
    add("--json", type=Path, metavar="FILE", help="also write the findings to this file")


def run(options: Options, overrides: Overrides) -> None:
    check_target("--json", options.json)
    from lowlevel.preflight.doctor import run_doctor
    from lowlevel.running.progress import make_console

    run_doctor(options.out, options.json, make_console(), quiet_console)
