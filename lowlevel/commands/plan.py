"""forecast a run's GPU memory and find the fastest way to fit a budget; no GPU, no weights"""

from lowlevel.commands.common import Options, Overrides, Parser, add_run_file, quiet_console, read_run_file


def add_arguments(parser: Parser) -> None:
    add_run_file(parser, required=True)
    parser.add_argument("--budget", metavar="SIZE", help='such as "15GiB" (default: train.memory_budget, or 15GiB)')


def run(options: Options, overrides: Overrides) -> None:
    config, console = read_run_file(options, overrides), quiet_console()
    from lowlevel.preflight.plan import show_plan

    show_plan(config, console, options.budget)
