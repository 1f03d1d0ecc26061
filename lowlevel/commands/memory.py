"""GPU memory of a run's largest micro-batch, by component and phase"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, quiet_console


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    from lowlevel.preflight.plan import show_memory

    show_memory(options.run_dir, console)
