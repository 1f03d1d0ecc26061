"""Shared by several commands: number types of options, the run file with its flags, and the console."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from lowlevel.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lowlevel.config.schema import RunConfig

Options = argparse.Namespace
Overrides = dict[str, str]  # "section.key" -> text as typed


class Parser(argparse.ArgumentParser):
    """Lists every configuration key in the help of a command whose flags they are."""

    def format_help(self) -> str:
        """Pydantic is imported only if the keys are listed."""
        if self.get_default("takes_config"):
            self.epilog = describe_keys()
        return super().format_help()


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole_number(text, 1)


def not_negative(text: str) -> int:
    """A whole number from 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:  # argparse adds the option's name and exits with code 2
        raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
    return int(text)


def add_run_file(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """RUN.toml; every key of it is also a flag."""
    text = None if required else "run file; without one, only flags"
    parser.add_argument("config", type=Path, nargs=None if required else "?", metavar="RUN.toml", help=text)
    parser.set_defaults(takes_config=True)


def check_resume(options: Options) -> None:
    """Raises ConfigError if both --resume and --restart are given."""
    if options.resume and options.restart:
        raise ConfigError("--resume continues a run and --restart discards it: give one of them")


def read_run_file(options: Options, overrides: Overrides, method: str | None = None) -> RunConfig:
    """The configuration of the run file with flags applied.

    Raises:
        ConfigError: one line for each problem.
    """
    from lowlevel.config.file import load_config

    if vars(options).get("on_bad_row"):
        overrides = {**overrides, "data.on_bad_row": options.on_bad_row}
    return load_config(options.config, overrides, method=method)


def quiet_console() -> Console:
    """Standard output, without progress bars and advice of libraries; their errors still show."""
    from lowlevel.running.progress import make_console, quiet_libraries

    quiet_libraries()
    return make_console()


def describe_keys() -> str:
    """Every key of a run file as a flag, with its choices and default."""
    from lowlevel.config.schema import DPO_DEFAULTS, SECTIONS

    lines = ["every key of the run file is also a flag:"]
    for section, model in SECTIONS.items():
        lines.append("")
        for key, field in model.model_fields.items():
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            listed = f" [{' | '.join(choices)}]" if choices else ""
            for_dpo = f"; for dpo: {DPO_DEFAULTS[section][key]}" if key in DPO_DEFAULTS.get(section, {}) else ""
            default = "" if field.default is None else f" (default: {field.default}{for_dpo})"
            lines.append(f"  --{section}.{key:<30} {field.description}{listed}{default}")
    return "\n".join(lines)
