"""`lowlevel sft` and `lowlevel dpo`"""

from lowlevel.commands.common import (
    Options,
    Overrides,
    Parser,
    add_run_file,
    check_resume,
    quiet_console,
    read_run_file,
)
from lowlevel.errors import ConfigError
from lowlevel.running.endings import Interrupts

# A T4 lacks bf16 and FlashAttention 2 (compute capability 8.0); a process can use 15 GiB of it.
AS_T4 = {"train.precision": "fp16", "model.attn_implementation": "efficient"}
T4_BYTES = 15 * 2**30


def add_arguments(parser: Parser) -> None:
    add_run_file(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the newest verified checkpoint")
    parser.add_argument("--restart", action="store_true", help="discard the run in the folder")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="with --resume: continue although KEY differs from the checkpoint (train.learning_rate, data_sha256, "
        "base, versions.torch, ...: the error names it); repeatable",
    )
    parser.add_argument("--on-bad-row", choices=("error", "skip"), help="short for --data.on_bad_row")
    parser.add_argument(
        "--as-t4", action="store_true", help="on a larger GPU: fp16, 15 GiB, and only the attention that a T4 has"
    )


def run(options: Options, overrides: Overrides) -> None:
    if options.as_t4:
        if AS_T4.keys() & overrides.keys():
            raise ConfigError(f"--as-t4 sets {' and '.join(AS_T4)}: leave them out")
        overrides = {**overrides, **AS_T4}
    config = read_run_file(options, overrides, options.command)
    check_resume(options)
    if options.allow_change and not options.resume:
        raise ConfigError("--allow-change needs --resume, which compares a run with its checkpoint")
    with Interrupts() as interrupts:
        try:
            console = quiet_console()
            from lowlevel.api import train

            if options.as_t4:
                _cap_gpu_memory(T4_BYTES)
            resume = {"resume": options.resume, "allow_change": options.allow_change}
            train(config, console=console, restart=options.restart, **resume)
        except KeyboardInterrupt:
            raise interrupts.error() from None


def _cap_gpu_memory(size: int) -> None:
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
