"""forecast a run's GPU memory and find the fastest way to fit a budget; no GPU, no weights"""

from lowlevel.commands.common import Options, Overrides, Parser, add_run_file, positive, quiet_console, read_any_run


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add_run_file(parser)
    add("--gpus", type=positive, default=1, metavar="N", help="forecast for N GPUs that share each step")
    add("--budget", metavar="SIZE", help='such as "15GiB" (default: train.memory_budget, or 15GiB)')


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    config = read_any_run(options, overrides, console)
    from lowlevel.preflight.plan import show_plan

    show_plan(config, console, options.budget, options.gpus)
