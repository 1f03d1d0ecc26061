"""The command line: parses, calls one function of `lowlevel.commands`, and turns errors into one line and an exit code.

Heavy imports sit inside the commands, so `lowlevel --help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from lowlevel import __version__
from lowlevel.config import SECTIONS, load_config
from lowlevel.errors import ConfigError, LowlevelError, OutOfMemoryError

EXIT_CODES = (
    "exit codes: 0 done, 1 other, 2 usage or configuration, 3 data, 4 checkpoint or model, 5 not a finite number, \
6 out of memory, 130/143 interrupted and saved"
)


LOSS_FLAGS = {
    "chosen": "log-probability of the chosen completion under the policy (default: -10)",
    "rejected": "of the rejected completion (default: -12)",
    "ref_chosen": "of the chosen completion under the reference (default: -11)",
    "ref_rejected": "of the rejected completion under the reference (default: -11.5)",
    "chosen_length": "tokens in the chosen completion: ipo, sigmoid_norm, rpo (default: 4)",
    "rejected_length": "tokens in the rejected completion (default: 5)",
    "beta": "temperature (default: 0.1)",
    "label_smoothing": "share of flipped labels, for cdpo, robust, exo_pair and both aot (default: 0; exo_pair 0.001)",
    "discopop_tau": "discopop's temperature (default: 0.05)",
    "dpop_lambda": "dpop's penalty (default: 50)",
    "rpo_alpha": "weight of rpo's NLL term (default: 1)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        words, overrides = split_overrides(arguments)
        options, unknown = parser.parse_known_args(join_negative_numbers(words))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        if unknown or (overrides and not options.takes_config):
            word = unknown[0] if unknown else f"--{next(iter(overrides))}"
            raise ConfigError(f"unknown argument {word!r}; lowlevel {options.command} --help lists what there is")
        options.run(options, overrides)
    except LowlevelError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except Exception as error:
        if options.debug:
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch.cuda's; torch may not be imported here
            print(f"error: out of memory: {error}", file=sys.stderr)
            return OutOfMemoryError.exit_code
        print(f"error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="lowlevel",
        description="QLoRA SFT and DPO on one small GPU, from hand-written loops whose every number can be checked.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_text: str, run, *, takes_config: bool = False) -> argparse.ArgumentParser:  # noqa: ANN001
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=describe_keys() if takes_config else None,
        )
        command.set_defaults(run=run, takes_config=takes_config)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    demo = add("demo", "SFT, DPO and comparison of a built-in small model: offline, CPU or GPU", _demo)
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the demo's runs (default: out/demo)"
    )
    for method, text in (("sft", "supervised fine-tuning"), ("dpo", "Direct Preference Optimization")):
        train = add(method, text, _train, takes_config=True)
        train.add_argument(
            "config", type=Path, nargs="?", metavar="RUN.toml", help="run file; without one, flags alone"
        )
        train.add_argument("--resume", action="store_true", help="go on from the newest verified checkpoint")
        train.add_argument("--restart", action="store_true", help="discard the run that the folder holds")
        train.add_argument("--on-bad-row", choices=("error", "skip"), help="short for --data.on_bad_row")
        train.add_argument(
            "--as-t4", action="store_true", help="on a larger GPU: fp16, 15 GiB, and only the attention that a T4 has"
        )
    data = add("data", "what a run will train on, without a GPU and without the model", _data, takes_config=True)
    data.add_argument("config", type=Path, metavar="RUN.toml")
    data.add_argument("--on-bad-row", choices=("error", "skip"), help="short for --data.on_bad_row")
    _add_losses(add)
    plan = add("plan", "forecast a run's GPU memory and find the fastest way to fit a budget", _plan, takes_config=True)
    plan.add_argument("config", type=Path, metavar="RUN.toml")
    plan.add_argument("--budget", metavar="SIZE", help='like "15GiB" (default: train.memory_budget, or 15GiB)')
    memory = add("memory", "what a run's largest micro-batch took of the GPU's memory, by component and phase", _memory)
    memory.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    memory.add_argument("--plot", type=Path, metavar="FILE.png")
    _add_model_commands(add)
    return parser


def _add_losses(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The numbers are checked by the command, which has one line for whatever is wrong with them."""
    losses = add("losses", "preference losses: formula, paper, value and gradient at a point, curves", _losses)
    for name, text in LOSS_FLAGS.items():
        losses.add_argument(f"--{name.replace('_', '-')}", metavar="NUMBER", help=text)
    losses.add_argument(
        "--loss", metavar="NAME", help="this loss alone, every digit; an option it does not use is an error"
    )
    losses.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss and slope over the margin")
    losses.add_argument("--json", action="store_true", help="JSON with every digit")


def _add_model_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that use a finished run."""
    merge = add("merge", "merge a run's adapters into its base, and measure what that changes", _merge)
    merge.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    merge.add_argument(
        "--into",
        choices=("dequantized", "original", "requantized"),
        default="dequantized",
        help="dequantized: the 4-bit base that was trained against, in 16 bits (default); original: the unquantised "
        "base; requantized: the merged original, quantised anew",
    )
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the merged model")
    generate = add("generate", "reply to a prompt with a run, an adapter or a merged model", _generate)
    generate.add_argument("model_dir", type=Path, metavar="DIR", help="run folder, PEFT adapter or merged model")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--system", metavar="TEXT", help="system message")
    generate.add_argument("--max-new-tokens", type=_positive, default=256)
    generate.add_argument("--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--seed", type=int, default=0)
    compare = add("compare", "base, SFT and DPO side by side on the run's held-out rows", _compare)
    compare.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    compare.add_argument("--prompts", type=_positive, default=16, help="held-out prompts to reply to (default: 16)")
    compare.add_argument("--max-new-tokens", type=_positive, default=128)
    compare.add_argument("--show", type=int, default=3, help="replies to print side by side (default: 3)")
    _add_inspect(add)
    _add_verify(add)
    report = add(
        "report", "a run as one page: curves, its best and worst pairs, alarms; and the charts as PNG", _report
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN_DIR", help="draw these runs into the same charts"
    )
    _add_replay(add)


def _add_inspect(add: Callable[..., argparse.ArgumentParser]) -> None:
    inspect = add("inspect", "a step or a row of a run, token by token, down to the numbers of the loss", _inspect)
    inspect.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    what = inspect.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=_positive, metavar="N", help="the examples of optimizer step N, as the log counts")
    what.add_argument("--example", type=_not_negative, metavar="I", help="data row I, as data report and errors say")
    inspect.add_argument(
        "--checkpoint",
        type=_not_negative,
        metavar="K",
        help="weights of checkpoint step-K, 0: before the first step (default: for a step the newest checkpoint before "
        "it, for a row the final adapter)",
    )
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of the tables of tokens")


def _add_verify(add: Callable[..., argparse.ArgumentParser]) -> None:
    verify = add(
        "verify", "recompute a step of a run in float64: errors and bounds, exit code 1 where one fails", _verify
    )
    verify.add_argument("path", type=Path, metavar="RUN_DIR|RUN.toml", help="run folder, or run file for a run's start")
    verify.add_argument("--batch", type=_positive, default=1, metavar="N", help="optimizer step to take (default: 1)")
    verify.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write the result (default: in the run folder)"
    )
    verify.add_argument(
        "--exact-parameters",
        type=_not_negative,
        default=500_000_000,
        metavar="N",
        help="a base of up to N weights is also run in float64, on the CPU (default: 500,000,000)",
    )


def _add_replay(add: Callable[..., argparse.ArgumentParser]) -> None:
    replay = add("replay", "take a step of a run again and hold it against what was logged and saved", _replay)
    replay.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    replay.add_argument("--step", type=_positive, required=True, metavar="N", help="optimizer step, as the log counts")
    replay.add_argument(
        "--from",
        type=_not_negative,
        dest="start",
        metavar="K",
        help="start from checkpoint step-K, 0: the start of the run (default: the newest checkpoint before the step)",
    )
    replay.add_argument("--dump", type=Path, metavar="DIR", help="write every intermediate of the step as safetensors")
    replay.add_argument("--dump-layers", action="store_true", help="with --dump: outputs of the decoder layers, too")
    replay.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the step under another beta, loss_type (dpo), learning_rate or max_grad_norm; repeatable, a comma joins",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)  # argparse names the option and ends with exit code 2
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def describe_keys() -> str:
    """Every key of a run file as a flag, with its default."""
    lines = ["every key of the run file is also a flag:"]
    for section, model in SECTIONS.items():
        lines.append("")
        for key, field in model.model_fields.items():
            default = "" if field.default is None else f" (default: {field.default})"
            lines.append(f"  --{section}.{key:<30} {field.description}{default}")
    return "\n".join(lines)


def join_negative_numbers(words: Sequence[str]) -> list[str]:
    """`--flag -1e3` as `--flag=-1e3`: argparse takes -10 for a value, but -1e3 and -inf for flags of their own."""
    joined: list[str] = []
    for word in words:
        after_flag = bool(joined) and joined[-1].startswith("--") and "=" not in joined[-1]
        if after_flag and word.startswith("-") and _is_number(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--section.key value` and `--section.key=value` out of the arguments, wherever they stand.

    Raises:
        ConfigError: a key without a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            rest.append(word)
            continue
        if not equals:
            if not words:
                raise ConfigError(f"{word} needs a value")
            value = words.pop(0)
        overrides[name] = value
    return rest, overrides


def _quiet() -> None:
    """Keep libraries' progress bars and advice out of the output; errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_loading_bar

    disable_progress_bar()
    disable_loading_bar()
    # bitsandbytes 0.50 advises on CPUs with AVX512-BF16 to download a kernel from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 renamed gradient_checkpointing_enable; 5.17 has only the old name, and PEFT 0.21 calls it too.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _load(options: argparse.Namespace, overrides: dict[str, str], method: str | None):  # noqa: ANN202
    if options.on_bad_row:
        overrides = {**overrides, "data.on_bad_row": options.on_bad_row}
    return load_config(options.config, overrides, method=method)


# What a T4 has not got: bf16, FlashAttention 2 (compute capability 8.0), more than 15 GiB that a process can use.
AS_T4 = {"train.precision": "fp16", "model.attn_implementation": "efficient"}
T4_BYTES = 15 * 2**30


def _train(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    if options.as_t4:
        if AS_T4.keys() & overrides.keys():
            raise ConfigError(f"--as-t4 sets {' and '.join(AS_T4)}: leave them out")
        overrides = {**overrides, **AS_T4}
    config = _load(options, overrides, options.command)
    if options.resume and options.restart:
        raise ConfigError("--resume goes on with a run and --restart discards it: give one of them")
    _quiet()
    from lowlevel.progress import make_console
    from lowlevel.run import run_training

    if options.as_t4:
        _cap_gpu_memory(T4_BYTES)
    run_training(config, make_console(), resume=options.resume, restart=options.restart)


def _cap_gpu_memory(size: int) -> None:
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))


def _plan(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.plan import show_plan
    from lowlevel.progress import make_console

    show_plan(load_config(options.config, overrides), make_console(), options.budget)


def _memory(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from lowlevel.commands.plan import show_memory
    from lowlevel.progress import make_console

    show_memory(options.run_dir, make_console(), options.plot)


def _data(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = _load(options, overrides, None)
    _quiet()
    from lowlevel.commands.data import show_data
    from lowlevel.progress import make_console

    show_data(config, make_console())


def _losses(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from rich.console import Console

    from lowlevel.commands.losses import show_losses

    given = {name: value for name in LOSS_FLAGS if (value := vars(options)[name]) is not None}
    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = Console(highlight=False, width=fixed)
    show_losses(given, console, name=options.loss, plot=options.plot, as_json=options.json)


def _demo(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.demo import run_demo
    from lowlevel.progress import make_console

    run_demo(options.out, make_console())


def _merge(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.merge import merge_run
    from lowlevel.progress import make_console

    merge_run(options.run_dir, options.into, options.out, make_console())


def _inspect(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.inspect import inspect_run
    from lowlevel.progress import make_console

    inspect_run(
        options.run_dir,
        make_console(),
        step=options.step,
        example=options.example,
        checkpoint=options.checkpoint,
        html=options.html,
    )


def _verify(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.verify import verify_run
    from lowlevel.progress import make_console

    verify_run(
        options.path,
        make_console(),
        batch=options.batch,
        json_file=options.json,
        exact_parameters=options.exact_parameters,
    )


def _report(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.report import report_run
    from lowlevel.progress import make_console

    report_run(options.run_dir, make_console(), compare=options.compare)


def _replay(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    if options.dump_layers and not options.dump:
        raise ConfigError("--dump-layers needs --dump DIR")
    _quiet()
    from lowlevel.commands.replay import replay_run
    from lowlevel.progress import make_console

    replay_run(
        options.run_dir,
        make_console(),
        step=options.step,
        start=options.start,
        dump=options.dump,
        layers=options.dump_layers,
        settings=options.what_if,
    )


def _generate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.generate import Sampling, stream_reply

    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    stream_reply(options.model_dir, options.prompt, options.system, sampling)


def _compare(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    _quiet()
    from lowlevel.commands.compare import compare_run
    from lowlevel.progress import make_console

    compare_run(
        options.run_dir,
        make_console(),
        prompts=options.prompts,
        max_new_tokens=options.max_new_tokens,
        show=options.show,
    )
