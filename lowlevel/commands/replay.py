"""take a step of a run again and compare it with the log and the saved weights"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, not_negative, positive, quiet_console
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR")
    add("--step", type=positive, required=True, metavar="N", help="optimizer step, from 1 as in the log")
    text = "start from checkpoint step-K; 0: from the start (default: the newest checkpoint before the step)"
    add("--from", type=not_negative, dest="start", metavar="K", help=text)
    add("--dump", type=Path, metavar="DIR", help="write every intermediate of the step as safetensors")
    add("--dump-layers", action="store_true", help="with --dump: also the outputs of the decoder layers")
    text = "also take the step with another beta, loss_type (dpo), learning_rate or max_grad_norm; by comma, repeatable"
    add("--what-if", action="append", default=[], metavar="NAME=VALUE", help=text)


def run(options: Options, overrides: Overrides) -> None:
    if options.dump_layers and not options.dump:
        raise ConfigError("--dump-layers needs --dump DIR")
    console = quiet_console()
    from lowlevel.replaying.replay import replay_run
    from lowlevel.replaying.report import print_replay
    from lowlevel.running.progress import lines_to
    from lowlevel.running.reopening import reopen

    found = replay_run(
        reopen(options.run_dir, lines_to(console)),
        options.step,
        start=options.start,
        dump=options.dump,
        layers=options.dump_layers,
        settings=options.what_if,
    )
    print_replay(found, console)
    if options.dump:
        console.print(f"step {options.step} written to {options.dump}: index.json describes each tensor", markup=False)
    found.check()
