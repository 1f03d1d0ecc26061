"""`lowlevel sft` and the other methods"""

import os

from lowlevel.commands.common import (
    Options,
    Overrides,
    Parser,
    add_run_file,
    cap_gpu_memory,
    check_resume,
    positive,
    quiet_console,
    read_run_file,
)
from lowlevel.errors import ConfigError
from lowlevel.heartbeat import silence
from lowlevel.running.endings import Interrupts


def add_arguments(parser: Parser) -> None:
    add_run_file(parser, method=False)
    parser.add_argument("--resume", action="store_true", help="continue from the newest verified checkpoint")
    parser.add_argument("--restart", action="store_true", help="discard the run in the folder")
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="share each step among N GPUs (starts torchrun)"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="with --resume: continue although KEY differs from the checkpoint (train.learning_rate, data_sha256, "
        "base, versions.torch, ...: the error names it); repeatable",
    )


def run(options: Options, overrides: Overrides) -> None:
    config = read_run_file(options, overrides, options.command)
    check_resume(options)
    if options.allow_change and not options.resume:
        raise ConfigError("--allow-change needs --resume, which compares a run with its checkpoint")
    if options.gpus > 1 and "LOCAL_RANK" not in os.environ:  # which torchrun sets
        from lowlevel.ranks import launch

        with silence():
            raise SystemExit(launch(options.arguments, options.gpus))
    with Interrupts() as interrupts:
        try:
            console = quiet_console()
            from lowlevel.running.run import run_training

            cap_gpu_memory(options)
            resume = {"resume": options.resume, "allow_change": options.allow_change}
            run_training(config, console, restart=options.restart, **resume)
        except KeyboardInterrupt:
            raise interrupts.error() from None
