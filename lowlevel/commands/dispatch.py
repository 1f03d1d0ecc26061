"""From parsed options to the function of `lowlevel.commands` that does the work, imported when it is called."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lowlevel.commands.arguments import LOSS_FLAGS
from lowlevel.config.file import load_config
from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.running.interrupts import Interrupts

if TYPE_CHECKING:
    from rich.console import Console

Options = argparse.Namespace
Overrides = dict[str, str]  # "section.key" -> text as typed
# What a T4 has not got: bf16, FlashAttention 2 (compute capability 8.0), more than 15 GiB that a process can use.
AS_T4 = {"train.precision": "fp16", "model.attn_implementation": "efficient"}
T4_BYTES = 15 * 2**30


def run_command(options: Options, overrides: Overrides) -> None:
    """Run the command that was typed."""
    COMMANDS[options.command](options, overrides)


def _quiet_console() -> Console:
    """Where output goes; libraries' progress bars and advice stay out of it, their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_loading_bar

    from lowlevel.running.progress import make_console

    disable_progress_bar()
    disable_loading_bar()
    # bitsandbytes 0.50 advises on CPUs with AVX512-BF16 to download a kernel from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 renamed gradient_checkpointing_enable; PEFT 0.21 calls it by the name that 5.17 has alone.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return make_console()


def _config(options: Options, overrides: Overrides, method: str | None = None) -> RunConfig:
    if options.on_bad_row:
        overrides = {**overrides, "data.on_bad_row": options.on_bad_row}
    return load_config(options.config, overrides, method=method)


def _train(options: Options, overrides: Overrides) -> None:
    if options.as_t4:
        if AS_T4.keys() & overrides.keys():
            raise ConfigError(f"--as-t4 sets {' and '.join(AS_T4)}: leave them out")
        overrides = {**overrides, **AS_T4}
    config = _config(options, overrides, options.command)
    _check_one_of(options)
    if options.allow_change and not options.resume:
        raise ConfigError("--allow-change is for --resume, which compares a run with its checkpoint")
    with Interrupts() as interrupts:
        try:
            console = _quiet_console()
            from lowlevel.running.run import run_training

            if options.as_t4:
                _cap_gpu_memory(T4_BYTES)
            resume = {"resume": options.resume, "allow_change": options.allow_change}
            run_training(config, console, restart=options.restart, **resume)
        except KeyboardInterrupt:
            raise interrupts.error() from None


def _check_one_of(options: Options) -> None:
    if options.resume and options.restart:
        raise ConfigError("--resume goes on with a run and --restart discards it: give one of them")


def _cap_gpu_memory(size: int) -> None:
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))


def _demo(options: Options, overrides: Overrides) -> None:
    _check_one_of(options)
    console = _quiet_console()
    from lowlevel.commands.demo import run_demo

    run_demo(options.out, console, resume=options.resume, restart=options.restart)


def _doctor(options: Options, overrides: Overrides) -> None:
    from lowlevel.commands.doctor import run_doctor
    from lowlevel.running.progress import make_console

    run_doctor(options.out, options.json, make_console(), _quiet_console)  # which imports what may not be here


def _data(options: Options, overrides: Overrides) -> None:
    config, console = _config(options, overrides), _quiet_console()
    from lowlevel.commands.data import show_data

    show_data(config, console)


def _losses(options: Options, overrides: Overrides) -> None:
    from lowlevel.commands.losses import show_losses
    from lowlevel.running.progress import PipedConsole

    given = {name: value for name in LOSS_FLAGS if (value := vars(options)[name]) is not None}
    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = PipedConsole(highlight=False, width=fixed)
    show_losses(given, console, name=options.loss, plot=options.plot, as_json=options.json)


def _plan(options: Options, overrides: Overrides) -> None:
    config, console = load_config(options.config, overrides), _quiet_console()
    from lowlevel.commands.plan import show_plan

    show_plan(config, console, options.budget)


def _time(options: Options, overrides: Overrides) -> None:
    config, console = load_config(options.config, overrides), _quiet_console()
    from lowlevel.commands.time import time_run

    time_run(config, console, steps=options.steps, json_file=options.json)


def _memory(options: Options, overrides: Overrides) -> None:
    console = _quiet_console()
    from lowlevel.commands.plan import show_memory

    show_memory(options.run_dir, console, options.plot)


def _merge(options: Options, overrides: Overrides) -> None:
    console = _quiet_console()
    from lowlevel.commands.merge import merge_run

    merge_run(options.run_dir, options.into, options.out, console)


def _generate(options: Options, overrides: Overrides) -> None:
    _quiet_console()
    from lowlevel.commands.generate import Sampling, stream_reply

    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    stream_reply(options.model_dir, options.prompt, options.system, sampling)


def _compare(options: Options, overrides: Overrides) -> None:
    console = _quiet_console()
    from lowlevel.commands.compare import compare_run

    compare_run(
        options.run_dir, console, prompts=options.prompts, max_new_tokens=options.max_new_tokens, show=options.show
    )


def _inspect(options: Options, overrides: Overrides) -> None:
    console = _quiet_console()
    from lowlevel.commands.inspect import inspect_run

    inspect_run(
        options.run_dir,
        console,
        step=options.step,
        example=options.example,
        checkpoint=options.checkpoint,
        html=options.html,
    )


def _verify(options: Options, overrides: Overrides) -> None:
    if overrides and options.path.is_dir():
        raise ConfigError(
            f"--{next(iter(overrides))}: {options.path} has its own config.toml; flags are for a run file"
        )
    console = _quiet_console()
    from lowlevel.commands.verify import verify_run

    verify_run(
        options.path,
        console,
        overrides=overrides,
        batch=options.step,
        json_file=options.json,
        exact_parameters=options.exact_parameters,
    )


def _report(options: Options, overrides: Overrides) -> None:
    console = _quiet_console()
    from lowlevel.commands.report import report_run

    report_run(options.run_dir, console, compare=options.compare, displaced=options.displaced)


def _replay(options: Options, overrides: Overrides) -> None:
    if options.dump_layers and not options.dump:
        raise ConfigError("--dump-layers needs --dump DIR")
    console = _quiet_console()
    from lowlevel.commands.replay import replay_run

    replay_run(
        options.run_dir,
        console,
        step=options.step,
        start=options.start,
        dump=options.dump,
        layers=options.dump_layers,
        settings=options.what_if,
    )


COMMANDS: Mapping[str, Callable[[Options, Overrides], None]] = {
    "demo": _demo,
    "doctor": _doctor,
    "sft": _train,
    "dpo": _train,
    "data": _data,
    "losses": _losses,
    "plan": _plan,
    "time": _time,
    "memory": _memory,
    "merge": _merge,
    "generate": _generate,
    "compare": _compare,
    "inspect": _inspect,
    "verify": _verify,
    "report": _report,
    "replay": _replay,
}
