"""The command line: parses, runs one command, and turns errors into one line and an exit code.

What can be typed stands in arguments.py, what each command calls in dispatch.py. Heavy imports sit inside the commands,
so `lowlevel --help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import TextIO, cast

from lowlevel.commands.arguments import build_parser
from lowlevel.commands.dispatch import run_command
from lowlevel.errors import ConfigError, LowlevelError, OutOfMemoryError, printable
from lowlevel.redaction import RedactedStream


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; no secret reaches either of its streams."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with redirect_stdout(_redacted(sys.stdout)), redirect_stderr(_redacted(sys.stderr)):
        try:
            words, overrides = split_overrides(arguments)
            options, unknown = build_parser().parse_known_args(join_negative_numbers(words))
        except ConfigError as error:
            return _failed(error, debug=False)
        try:
            if unknown or (overrides and not options.takes_config):
                word = unknown[0] if unknown else f"--{next(iter(overrides))}"
                raise ConfigError(f"unknown argument {word!r}; lowlevel {options.command} --help lists what there is")
            run_command(options, overrides)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python's own last flush fails aloud
            return 130
        except Exception as error:
            return _failed(error, options.debug)
    return 0


def _redacted(stream: TextIO) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show must not end a run
    return cast("TextIO", RedactedStream(stream))


def _failed(error: Exception, debug: bool) -> int:
    """Say what went wrong, with --debug also where, and return the exit code."""
    if debug:
        sys.stderr.write(traceback.format_exc())
    if isinstance(error, LowlevelError):
        code, line = error.exit_code, str(error)
    elif type(error).__name__ == "OutOfMemoryError":  # torch.cuda's; torch may not be imported here
        code, line = OutOfMemoryError.exit_code, f"out of memory: {error}"
    else:
        code, line = 1, printable(f"{type(error).__name__}: {error}{'' if debug else ' (--debug shows where)'}")
    print(f"error: {line}", file=sys.stderr)
    return code


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
