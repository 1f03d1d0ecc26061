"""base, SFT and DPO side by side on the run's held-out rows; or, with --probe, what they forgot of general text"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, positive, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR")
    add("--prompts", type=positive, default=16, metavar="N", help="held-out prompts to reply to (default: 16)")
    add("--max-new-tokens", type=positive, default=128, help="longest reply, in tokens (default: 128)")
    text = 'instead: loss and KL a token against the base, by domain: rows with a "text" and, if you like, a "domain"'
    add("--probe", type=Path, metavar="FILE", help=text)
    add("--show", type=int, default=3, metavar="N", help="replies to print side by side (default: 3)")


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    if options.probe:
        from lowlevel.evaluation.forgetting import probe_run

        probe_run(options.run_dir, options.probe, console)
        return
    from lowlevel.reporting.comparison import compare_run

    compare_run(
        options.run_dir, console, prompts=options.prompts, max_new_tokens=options.max_new_tokens, show=options.show
    )
