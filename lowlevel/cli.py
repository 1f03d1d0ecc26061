"""The command line: parses, runs one command, and turns errors into one line and an exit code.

Each command is a file of commands/. Its docstring is the command's help; `add_arguments` adds its options, and `run`
executes it and imports the heavy libraries, so `lowlevel --help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import io
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from typing import TextIO, cast

from lowlevel.commands.common import Parser, number
from lowlevel.config import METHODS
from lowlevel.errors import (
    CONTINUE,
    CheckpointError,
    ConfigError,
    InterruptedRunError,
    LowlevelError,
    OutOfMemoryError,
    RankError,
    printable,
    quoted,
)
from lowlevel.heartbeat import heartbeat
from lowlevel.redaction import RedactedStream
from lowlevel.version import __version__

EXIT_CODES = (
    "exit codes: 0 done, 1 other, 2 usage or configuration, 3 data, 4 checkpoint, model or disk, 5 loss or gradient \
NaN or infinite, 6 out of memory, 130/143 interrupted and saved"
)
LONG_DASH = re.compile("[\u2013\u2014\u2212]+-?(?=[a-z]+[.][a-z])")  # what editors and web pages make of two hyphens
FIRST = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, which share a terminal
NAMES = ["demo", "doctor", *METHODS, *"data losses plan time memory merge export generate annotate score".split()]
NAMES += "compare eval judge inspect verify report replay".split()
COMMANDS = {name: import_module(f"lowlevel.commands.{'train' if name in METHODS else name}") for name in NAMES}


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="lowlevel",
        description="QLoRA fine-tuning on one small GPU, in plain PyTorch; every number can be checked.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        text = METHODS.get(name, command.__doc__)
        style = argparse.RawDescriptionHelpFormatter
        added = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=style)
        added.set_defaults(takes_config=False, output_is_result=False, method=name if name in METHODS else None)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(added)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; both output streams are redacted.

    Without `argv` it is the process's, which ends afterwards: quickly, and at another Ctrl-C without a traceback.
    """
    if argv is not None:
        return _run(list(argv))
    gc.set_threshold(10_000, 10, 1000)  # while modules are imported, full collections take 1.5 s
    try:
        return _run(sys.argv[1:])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        gc.freeze()  # Python's last collection would visit all objects of torch, for 1 s


def _run(arguments: list[str]) -> int:
    with redirect_stdout(_redacted(sys.stdout)), redirect_stderr(_redacted(sys.stderr)):
        try:
            words, overrides = split_overrides(arguments)
            if overrides and not words:
                key = next(iter(overrides))
                raise ConfigError(f"no command before --{quoted(key)}; lowlevel --help lists the commands")
            if words and not words[0].startswith("-") and words[0] not in COMMANDS:
                near = difflib.get_close_matches(words[0].lower(), COMMANDS, n=1)
                hint = f'did you mean "{near[0]}"?' if near else "lowlevel --help lists the commands"
                raise ConfigError(f'unknown command "{quoted(words[0])}"; {hint}')
            options, unknown = build_parser().parse_known_args(join_negative_numbers(words))
        except ConfigError as error:
            return _failed(error, debug=False)
        try:
            if unknown or (overrides and not options.takes_config):
                raise _unknown(unknown[0] if unknown else f"--{next(iter(overrides))}", options)
            say = partial(print, file=sys.stderr if options.output_is_result else sys.stdout, flush=True)
            options.arguments = arguments  # for the processes that --gpus starts
            streamed = options.output_is_result and sys.stdout.isatty()  # a line would break a reply in two
            long = options.command != "losses" and FIRST and not streamed
            with heartbeat(say, f"lowlevel {options.command}", on=long):
                COMMANDS[options.command].run(options, overrides)
        except KeyboardInterrupt:
            return _failed(InterruptedRunError("interrupted", signal.SIGINT), debug=False)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python prints an error at its last flush
            return 130
        except Exception as error:
            return _failed(error, options.debug, arguments)
    return 0


def _redacted(stream: TextIO) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot encode must not end a run
    return cast("TextIO", RedactedStream(stream))


def _failed(error: Exception, debug: bool, arguments: Sequence[str] = ()) -> int:
    """Print the error, with --debug after its traceback, and return the exit code.

    A run that was stopped is no error; if it was saved, the line has the command that continues it. Of several
    processes, all of which get the signal, the first one prints.
    """
    if debug:
        sys.stderr.write(traceback.format_exc())
    stopped = isinstance(error, InterruptedRunError)
    told = stopped and not FIRST or isinstance(error, RankError) and error.told
    if isinstance(error, LowlevelError):
        code, line = error.exit_code, str(error)
    elif isinstance(error, OSError) and error.filename:
        code, line = CheckpointError.exit_code, printable(f"{error.filename2 or error.filename}: {error.strerror}")
    elif type(error).__name__ == "OutOfMemoryError":  # torch.cuda's; torch may not be imported here
        code, line = OutOfMemoryError.exit_code, f"out of memory: {error}"
    else:
        code, line = 1, printable(f"{type(error).__name__}: {error}{'' if debug else ' (--debug shows where)'}")
    again = [word for word in arguments if word not in ("--resume", "--restart")]
    shown = f"continue with: {shlex.join(['lowlevel', *again, '--resume'])}"
    if not told:
        print(line.replace(CONTINUE, shown) if stopped else f"error: {line}", file=sys.stderr)
    return code


def _unknown(word: str, options: argparse.Namespace) -> ConfigError:
    """The error for an argument that a command does not have: a near one, or the commands that have it."""
    flag, command = word.partition("=")[0], options.command
    parsers = {name: Parser(prog=name) for name in COMMANDS}
    for name, parser in parsers.items():
        COMMANDS[name].add_arguments(parser)
    flags = {name: re.findall(r"--[a-z][a-z-]*", parser.format_usage()) for name, parser in parsers.items()}
    if options.takes_config and re.match("--?[A-Za-z]", flag):
        from lowlevel.config.file import flag_hint

        flag = f"--{flag.lstrip('-')}"
        hint = flag_hint(flag[2:].replace("-", "_"), options.method, flags[command])
    else:
        near = difflib.get_close_matches(flag, flags[command], n=1)
        hint = f"did you mean {near[0]}?" if near else ""
    if not hint and (owners := [name for name, own in flags.items() if flag in own]):
        hint = f"it is an option of {', '.join(owners)}: leave it out"
    hint = hint or f"lowlevel {command} --help lists the options"
    return ConfigError(f"unknown argument {quoted(word)!r}; {hint}")


def join_negative_numbers(words: Sequence[str]) -> list[str]:
    """`--flag -1e3` as `--flag=-1e3`: argparse reads -10 as a value, but -1e3 and -inf as flags."""
    joined: list[str] = []
    for word in words:
        after_flag = bool(joined) and joined[-1].startswith("--") and "=" not in joined[-1]
        if after_flag and word.startswith("-") and number(word) is not None:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split the arguments into words and `--section.key value` or `--section.key=value` overrides, in any order.

    Raises ConfigError: a key without a value, or two sources.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if LONG_DASH.match(word):
            meant = LONG_DASH.sub("--", word, count=1)
            raise ConfigError(f"{quoted(word)!r} begins with a long dash: write two hyphens, {quoted(meant)}")
        if not word.startswith("--") or "." not in name:
            rest.append(word)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{word} needs a value")
            value = words.pop(0)
        if name == "data.source" and overrides.get(name, value) != value:  # of other keys the last value wins
            both = f"{quoted(overrides[name])} and {quoted(value)}"
            raise ConfigError(f"--{name} is given twice: {both}; [[data.sources]] in a run file mixes several")
        overrides[name] = value
    return rest, overrides
