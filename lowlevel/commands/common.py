"""Shared by several commands: checks of their options, the run file with its flags, and the console."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, get_args, get_origin

from lowlevel.config import METHODS
from lowlevel.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lowlevel.config.schema import RunConfig

Options = argparse.Namespace
Overrides = dict[str, str]  # "section.key" -> text as typed
# A T4 lacks bf16 and FlashAttention 2 (compute capability 8.0); a process can use 15 GiB of it.
AS_T4 = {"train.precision": "fp16", "model.attn_implementation": "efficient"}
T4_BYTES = 15 * 2**30


class Parser(argparse.ArgumentParser):
    """Lists the configuration keys in the help of a command whose flags they are."""

    def format_help(self) -> str:
        """Pydantic is imported only if the keys are listed."""
        if self.get_default("takes_config"):
            self.epilog = describe_keys(self.get_default("method"))
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """One line, as for all other errors, without argparse's usage."""
        raise ConfigError(f"{message}; {self.prog} --help explains the options")


def whole_number(text: str, least: int) -> int:
    """A whole number from `least`."""
    if not text.isdecimal() or int(text) < least:  # argparse adds the option's name
        raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
    return int(text)


positive, not_negative = partial(whole_number, least=1), partial(whole_number, least=0)


def number(text: str) -> float | None:
    """A number, also an infinite one or NaN; None for another text."""
    try:
        return float(text)
    except ValueError:
        return None


def temperature(text: str) -> float:
    """A finite number from 0."""
    value = number(text)
    if value is None or not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value


def add_run_file(parser: argparse.ArgumentParser, *, method: bool = True) -> None:
    """RUN.toml, whose keys are also flags, and what else changes them; `method`: the command's name gives no method."""
    what = "run file or run folder" if method else "run file"
    parser.add_argument("config", type=Path, nargs="?", metavar="RUN.toml", help=f"{what}; without one, only flags")
    parser.set_defaults(takes_config=True)
    if method:
        text = "default: by the keys that only one has, else by the rows"
        parser.add_argument("--method", choices=METHODS, help=text)
    parser.add_argument("--on-bad-row", choices=("error", "skip"), help="short for --data.on_bad_row")
    parser.add_argument(
        "--as-t4", action="store_true", help="rehearse a T4 on a larger GPU: fp16, 15 GiB, its attention kernel"
    )


def check_target(flag: str, file: Path | None) -> None:
    """Raise ConfigError for a file that cannot be written, before any work is done for it."""
    if file and not file.parent.is_dir():
        raise ConfigError(f"{flag} {file}: no such folder")
    if file and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise ConfigError(f"{flag} {file}: {'a folder' if file.is_dir() else 'cannot be written'}")


def read_any_run(options: Options, overrides: Overrides, console: Console) -> RunConfig:
    """The configuration of a run file or run folder with flags applied; prints the method if it was inferred.

    Raises ConfigError with one line for each problem.
    """
    from lowlevel.config.file import config_from_tables, given_tables
    from lowlevel.config.method import infer_method
    from lowlevel.data.sources import column_names

    path: Path | None = options.config
    if path and path.is_dir():
        path /= "config.toml"
        if not path.exists():
            raise ConfigError(f"{path.parent} is not a run folder: it has no config.toml")
    tables = given_tables(path, with_short_flags(options, overrides), options.method)
    if "method" not in tables:
        data = tables.get("data", {})
        first = next(iter(data.get("sources") or ()), data)  # of a mix, whose parts must fit one method
        source, split = first.get("source", "demo"), first.get("split", "train")
        tables["method"], why = infer_method(tables, lambda: column_names(source, split))
        console.print(f"method: {tables['method']} ({why})", markup=False)
    return config_from_tables(tables, str(path or "flags"))


def with_short_flags(options: Options, overrides: Overrides) -> Overrides:
    """The keys that flags set, also those of --as-t4 and --on-bad-row."""
    if options.as_t4:
        if AS_T4.keys() & overrides.keys():
            raise ConfigError(f"--as-t4 sets {' and '.join(AS_T4)}: leave them out")
        overrides = {**overrides, **AS_T4}
    return {**overrides, "data.on_bad_row": options.on_bad_row} if options.on_bad_row else overrides


def cap_gpu_memory(options: Options) -> None:
    """With --as-t4: this process gets no more memory than on a T4."""
    import torch

    if options.as_t4 and torch.cuda.is_available():
        own = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun's
        total = torch.cuda.get_device_properties(own).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_BYTES / total), own)


def quiet_console() -> Console:
    """Standard output, without progress bars and advice of libraries; their errors still show."""
    from lowlevel.running.progress import make_console, quiet_libraries

    quiet_libraries()
    return make_console()


def describe_keys(method: str | None) -> str:
    """Every key that a method reads (None: any method) as a flag, with its choices and default."""
    from lowlevel.config.schema import METHOD_DEFAULTS, sections_of

    lines = ["every key of the run file is also a flag:"]
    for section, model in sections_of(method).items():
        own = {name: tables.get(section, {}) for name, tables in METHOD_DEFAULTS.items() if method in (None, name)}
        lines.append("")
        for key, field in model.model_fields.items():
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            listed = f" [{' | '.join(choices)}]" if choices else ""
            differing = {name: table[key] for name, table in own.items() if key in table}
            value = differing.pop(method, field.default) if method else field.default
            others = "".join(f"; for {name}: {other}" for name, other in differing.items())
            value = ",".join(value) if isinstance(value, tuple) else value  # as it is typed
            value = str(value).lower() if isinstance(value, bool) else value
            default = "" if value in (None, "", {}) else f" (default: {value}{others})"
            lines.append(f"  {f'--{section}.{key}':<37} {field.description}{listed}{default}")
    return "\n".join(lines)
