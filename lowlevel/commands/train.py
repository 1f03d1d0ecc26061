"""`lowlevel sft` and the other methods"""

import os

from lowlevel.commands import common
from lowlevel.commands.common import Options, Overrides, Parser
from lowlevel.heartbeat import paused
from lowlevel.running.endings import Interrupts


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    common.add_run_file(parser, method=False)
    add("--resume", action="store_true", help="continue from the newest verified checkpoint")
    add("--restart", action="store_true", help="discard the run in the folder")
    add("--gpus", type=common.positive, default=1, metavar="N", help="share each step among N GPUs (starts torchrun)")
    text = "with --resume: continue although KEY, which the error names, differs from the checkpoint; repeatable"
    add("--allow-change", action="append", default=[], metavar="KEY", help=text)


def run(options: Options, overrides: Overrides) -> None:
    from lowlevel.config.file import load_config

    config = load_config(options.config, common.with_short_flags(options, overrides), method=options.command)
    if options.gpus > 1 and "LOCAL_RANK" not in os.environ:  # which torchrun sets
        from lowlevel.launching import launch

        with paused():
            raise SystemExit(launch(options.arguments, options.gpus))
    with Interrupts() as interrupts:
        try:
            console = common.quiet_console()
            from lowlevel.running.training import run_training

            common.cap_gpu_memory(options)
            resume = {"resume": options.resume, "allow_change": options.allow_change}
            run_training(config, console, restart=options.restart, **resume)
        except KeyboardInterrupt:
            raise interrupts.error() from None
