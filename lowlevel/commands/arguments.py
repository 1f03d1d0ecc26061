"""What can be typed: the commands with their options. No heavy imports here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

from lowlevel import __version__
from lowlevel.config.schema import DPO_DEFAULTS, SECTIONS

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

    def add(name: str, help_text: str, *, takes_config: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=describe_keys() if takes_config else None,
        )
        command.set_defaults(takes_config=takes_config)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    _add_training(add)
    _add_losses(add)
    _add_forecasts(add)
    _add_model_commands(add)
    return parser


def _add_training(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that train, and what shows their rows beforehand."""
    demo = add("demo", "SFT, DPO and comparison of a built-in small model: offline, CPU or GPU")
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the demo's runs (default: out/demo)"
    )
    demo.add_argument("--resume", action="store_true", help="go on with the demo that the folder holds")
    demo.add_argument("--restart", action="store_true", help="discard the demo that the folder holds")
    doctor = add("doctor", "check this machine before a run, one line a check; exit code 1 where a run would fail")
    doctor.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where runs would be written (default: here)",
    )
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    for method, text in (("sft", "supervised fine-tuning"), ("dpo", "Direct Preference Optimization")):
        train = add(method, text, takes_config=True)
        train.add_argument(
            "config", type=Path, nargs="?", metavar="RUN.toml", help="run file; without one, flags alone"
        )
        train.add_argument("--resume", action="store_true", help="go on from the newest verified checkpoint")
        train.add_argument("--restart", action="store_true", help="discard the run that the folder holds")
        train.add_argument(
            "--allow-change",
            action="append",
            default=[],
            metavar="KEY",
            help="with --resume: go on although KEY differs from the checkpoint (train.learning_rate, data_sha256, "
            "base, versions.torch, ...: as the refusal names it); repeatable",
        )
        train.add_argument("--on-bad-row", choices=("error", "skip"), help="short for --data.on_bad_row")
        train.add_argument(
            "--as-t4", action="store_true", help="on a larger GPU: fp16, 15 GiB, and only the attention that a T4 has"
        )
    data = add("data", "what a run will train on, without a GPU and without the model", takes_config=True)
    data.add_argument("config", type=Path, nargs="?", metavar="RUN.toml", help="run file; without one, flags alone")
    data.add_argument("--on-bad-row", choices=("error", "skip"), help="short for --data.on_bad_row")


def _add_forecasts(add: Callable[..., argparse.ArgumentParser]) -> None:
    """What a run will take of the GPU's memory, what it took, and how long its steps take."""
    plan = add("plan", "forecast a run's GPU memory and find the fastest way to fit a budget", takes_config=True)
    plan.add_argument("config", type=Path, metavar="RUN.toml")
    plan.add_argument("--budget", metavar="SIZE", help='like "15GiB" (default: train.memory_budget, or 15GiB)')
    timed = add("time", "where a step's time goes: whole steps, and one by phase; trains nothing", takes_config=True)
    timed.add_argument("config", type=Path, nargs="?", metavar="RUN.toml", help="run file; without one, flags alone")
    timed.add_argument(
        "--steps", type=_positive, default=10, metavar="N", help="to measure, after 3 that are not (default: 10)"
    )
    timed.add_argument("--json", type=Path, metavar="FILE", help="write the result and every step there")
    memory = add("memory", "what a run's largest micro-batch took of the GPU's memory, by component and phase")
    memory.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    memory.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, by phase and component")


def _add_losses(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The numbers are checked by the command, which has one line for whatever is wrong with them."""
    losses = add("losses", "preference losses: formula, paper, value and gradient at a point, curves")
    for name, text in LOSS_FLAGS.items():
        losses.add_argument(f"--{name.replace('_', '-')}", metavar="NUMBER", help=text)
    losses.add_argument(
        "--loss", metavar="NAME", help="this loss alone, every digit; an option it does not use is an error"
    )
    losses.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss and slope over the margin")
    losses.add_argument("--json", action="store_true", help="JSON with every digit")


def _add_model_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that use a finished run."""
    merge = add("merge", "merge a run's adapters into its base, and measure what that changes")
    merge.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    merge.add_argument(
        "--into",
        choices=("dequantized", "original", "requantized"),
        default="dequantized",
        help="dequantized: the 4-bit base that was trained against, in 16 bits (default); original: the unquantised "
        "base; requantized: the merged original, quantised again",
    )
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the merged model")
    generate = add("generate", "reply to a prompt with a run, an adapter or a merged model")
    generate.add_argument("model_dir", type=Path, metavar="DIR", help="run folder, PEFT adapter or merged model")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    generate.add_argument("--system", metavar="TEXT", help="system message")
    generate.add_argument("--max-new-tokens", type=_positive, default=256, help="length of the reply (default: 256)")
    generate.add_argument("--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling, where temperature > 0 (default: 0)")
    compare = add("compare", "base, SFT and DPO side by side on the run's held-out rows")
    compare.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    compare.add_argument("--prompts", type=_positive, default=16, help="held-out prompts to reply to (default: 16)")
    compare.add_argument("--max-new-tokens", type=_positive, default=128, help="length of a reply (default: 128)")
    compare.add_argument("--show", type=int, default=3, help="replies to print side by side (default: 3)")
    _add_inspect(add)
    _add_verify(add)
    report = add(
        "report", "a run as one page, RUN_DIR/report.html: curves, best and worst pairs, alarms; and the charts as PNG"
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN_DIR", help="draw these runs into the same charts"
    )
    report.add_argument(
        "--displaced",
        type=_positive,
        metavar="N",
        help="load the model, and say which tokens took the probability of the N pairs whose chosen completions fell "
        "farthest below the reference",
    )
    _add_replay(add)


def _add_inspect(add: Callable[..., argparse.ArgumentParser]) -> None:
    inspect = add("inspect", "a step or a row of a run, token by token, down to the numbers of the loss")
    inspect.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    what = inspect.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=_positive, metavar="N", help="the examples of optimizer step N, as the log counts")
    what.add_argument("--example", type=_not_negative, metavar="ROW", help="data row, as data report and errors say")
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
        "verify",
        "check one step of a run against its formula in float64; exit code 1 where a check fails",
        takes_config=True,
    )
    verify.add_argument("path", type=Path, metavar="RUN_DIR|RUN.toml", help="run folder, or run file for a run's start")
    verify.add_argument(
        "--step", "--batch", type=_positive, default=1, metavar="N", help="optimizer step to check (default: 1)"
    )
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
    replay = add("replay", "take a step of a run again and hold it against what was logged and saved")
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
    return _whole_number(text, 1)


def _not_negative(text: str) -> int:
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:  # argparse names the option and ends with exit code 2
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value


def _choices(annotation: object) -> str:
    """The values of a Literal, for its help line."""
    return f" [{' | '.join(get_args(annotation))}]" if get_origin(annotation) is Literal else ""


def describe_keys() -> str:
    """Every key of a run file as a flag, with its choices and default."""
    lines = ["every key of the run file is also a flag:"]
    for section, model in SECTIONS.items():
        lines.append("")
        for key, field in model.model_fields.items():
            for_dpo = f"; for dpo: {DPO_DEFAULTS[section][key]}" if key in DPO_DEFAULTS.get(section, {}) else ""
            default = "" if field.default is None else f" (default: {field.default}{for_dpo})"
            lines.append(f"  --{section}.{key:<30} {field.description}{_choices(field.annotation)}{default}")
    return "\n".join(lines)
