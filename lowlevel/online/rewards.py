"""Reward functions: built-in ones, a reward run, and "module:function".

A function is called once for each prompt, with its G completions, by keyword, and with those of these it has parameters
for:

    prompts         G times the prompt's messages
    completions     G texts, without the tokens that end a reply
    completion_ids  G lists of token ids
    reference       G times the text of the row's own reply, else of its column "answer", or None
    and every column of the row by its name, G times its value

It returns G numbers. What it raises, a number that is NaN or infinite, and a call over the time limit are failures:
such a completion has no reward. It is left out of its group's mean, of the loss and of its count; the run counts it
(`rewards/failed`) and names row and function. A step without any reward ends the run.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlevel.config.online import SampledConfig
from lowlevel.data.examples import PromptExample
from lowlevel.errors import ConfigError, one_line
from lowlevel.heartbeat import limited, working
from lowlevel.losses.registry import imported, place_of, source_of
from lowlevel.model.adapters import adapter_sha256
from lowlevel.running.run_folder import check_reward_run

Function = Callable[..., Sequence[float]]
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
OWN: dict[str, Function] = {}  # functions given in Python that another process cannot import


def exact_match(completions: Sequence[str], reference: Sequence[str | None]) -> list[float]:
    """1 if the text is the reference, without white space around it, else 0. Raises ValueError without a reference."""
    return [float(text.strip() == right.strip()) for text, right in zip(completions, _given(reference), strict=True)]


def gsm8k(completions: Sequence[str], reference: Sequence[str | None]) -> list[float]:
    """1 if the final answer is that of the reference, as numbers, else 0.

    The final answer is the first number after the last "####", or without that mark the last number of the text.
    Raises ValueError without a reference, or if it has no number.
    """
    values = [final_answer(right) for right in _given(reference)]
    if None in values:
        raise ValueError("the reference has no number")
    return [float(final_answer(text) == value) for text, value in zip(completions, values, strict=True)]


def _given(reference: Sequence[str | None]) -> list[str]:
    found = [right for right in reference if right is not None]
    if len(found) < len(reference):
        raise ValueError("the row has no reply or answer to compare with")
    return found


def final_answer(text: str) -> Decimal | None:
    """The number that `gsm8k` compares; "$1,200.0" is 1200."""
    before, mark, after = text.rpartition("####")
    found = NUMBER.findall(after if mark else text)
    try:
        return Decimal(found[0 if mark else -1].replace(",", "").replace("$", "")) if found else None
    except InvalidOperation:
        return None


def _format(config: SampledConfig) -> Function:
    pattern = re.compile(config.reward_pattern or "", re.DOTALL)
    return lambda completions: [float(pattern.fullmatch(text.strip()) is not None) for text in completions]


def _length(config: SampledConfig) -> Function:
    return lambda completion_ids: [-len(ids) / config.max_completion_length for ids in completion_ids]


BUILT_IN: Mapping[str, Callable[[SampledConfig], Function]] = {
    "exact_match": lambda config: exact_match,
    "gsm8k": lambda config: gsm8k,
    "format": _format,  # 1 if the whole text matches reward_pattern
    "length": _length,  # minus the share of max_completion_length that is used
}
COMPARING = ("exact_match", "gsm8k")  # with the reference
ALWAYS = ("prompts", "completions", "completion_ids", "reference")  # what every call has
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Scores:
    """Rewards of one prompt's completions."""

    by_function: Tensor  # (F, G) float64; NaN: failed
    failures: tuple[str, ...]  # one line for a call or a number: row, function and reason


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a run, by name, with their weights in the sum."""

    functions: Mapping[str, Function]
    weights: tuple[float, ...]
    timeout: float  # seconds for one call

    @classmethod
    def of(cls, config: SampledConfig, load: Callable[[Path], Function]) -> Rewards:
        """The configured functions; `load` opens a reward run. Raises ConfigError."""
        functions = {name: _find(name, config, load) for name in config.reward}
        return cls(functions, config.reward_weights or (1.0,) * len(functions), config.reward_timeout)

    def __call__(self, example: PromptExample, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Scores:
        """Call every function for the completions of one prompt."""
        size = len(texts)
        given = {name: [value] * size for name, value in example.columns.items()}
        given |= {"prompts": [example.messages] * size, "reference": [example.reference] * size}
        given |= {"completions": list(texts), "completion_ids": [list(map(int, one)) for one in ids]}
        values, failures = [], list[str]()
        for name, function in self.functions.items():
            with working(f"reward {name}"):
                found, why = _called(function, given, size, self.timeout)
            values.append(found)
            failures += [f"{example.where} (row {example.row}), {name}: {reason}" for reason in why]
        return Scores(torch.tensor(values, dtype=torch.float64), tuple(failures))

    def total(self, by_function: Tensor) -> Tensor:
        """The weighted sum, (F, ...) -> (...); NaN where a function failed."""
        return torch.tensordot(torch.tensor(self.weights, dtype=torch.float64), by_function, dims=1)


def _called(function: Function, given: Mapping[str, Any], size: int, timeout: float) -> tuple[list[float], list[str]]:
    """The rewards of `size` completions, NaN where there is none, and the reasons."""
    accepted = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    named = {name: value for name, value in given.items() if takes_all or name in accepted}
    try:
        returned = limited(lambda: function(**named), timeout, "reward_timeout")
        if not isinstance(returned, Iterable):
            raise TypeError(f"returned {type(returned).__name__}, expected {size} numbers")
        found = [float(value) for value in returned]
    except Exception as error:  # a function of the user may raise anything
        return [math.nan] * size, [f"{type(error).__name__}: {one_line(error)}"]
    if len(found) != size:
        return [math.nan] * size, [f"{len(found)} rewards for {size} completions"]
    bad = [f"a reward is {value}" for value in found if not math.isfinite(value)]
    return [value if math.isfinite(value) else math.nan for value in found], bad


def _find(name: str, config: SampledConfig, load: Callable[[Path], Function]) -> Function:
    if name in BUILT_IN:
        return BUILT_IN[name](config)
    if name in OWN:
        return OWN[name]
    if Path(name).is_dir():
        return load(Path(name))
    if ":" in name:
        return _imported(name)
    near = difflib.get_close_matches(name, [*BUILT_IN, *OWN], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = f'{", ".join([*BUILT_IN, *OWN])}, the folder of a reward run, or your own as "module:function"'
    raise ConfigError(f"unknown reward {name!r}: {hint}known: {known}")


def _imported(name: str) -> Function:
    try:
        function: Function = imported(name, "reward")
    except ValueError as error:
        raise ConfigError(one_line(error)) from None
    if not callable(function) or inspect.isclass(function) or inspect.iscoroutinefunction(function):
        kind = "an async function" if callable(function) else "no function"
        kind = "a class" if inspect.isclass(function) else kind
        raise ConfigError(f"reward {name!r} is {kind}: give a function that returns a number for each completion")
    return function


def name_of(function: Function) -> str:
    """The name of a reward function given in Python: "module:function" if it can be imported, else its own name."""
    name = getattr(function, "__name__", type(function).__name__)
    if place := place_of(function, name):
        return place
    if name in BUILT_IN:
        raise ConfigError(f"reward: your function has the name of a built-in one, {name!r}: rename it")
    OWN[name] = function
    return name


def check(config: SampledConfig) -> None:
    """Raise ConfigError for a function or folder that does not exist, or a wrong pattern; loads no reward run."""

    def no_model(folder: Path) -> Function:
        check_reward_run(folder)
        return exact_match

    try:
        Rewards.of(config, no_model)
    except re.error as error:
        raise ConfigError(f"reward_pattern is not a regular expression: {error}") from None


def check_rows(config: SampledConfig, examples: Sequence[PromptExample]) -> None:
    """Raise ConfigError if rows lack what a function needs: a text to compare with, or a column that it names."""
    for name in config.reward:
        own = {} if name in BUILT_IN or not (function := _own(name)) else inspect.signature(function).parameters
        missing = {key: f'no column "{key}"' for key, p in own.items() if p.kind in NAMED and p.default is p.empty}
        missing = {key: what for key, what in missing.items() if key not in ALWAYS}
        if name in COMPARING:
            missing = {"reference": 'neither a reply nor a column "answer" to compare with'}
        for key, what in missing.items():
            without = [x for x in examples if (x.reference is None if key == "reference" else key not in x.columns)]
            if without:
                first = f"{len(without):,} of {len(examples):,} rows, the first {without[0].where}"
                raise ConfigError(f"reward {name}: {first}, have {what}: add it, or choose another reward")


def _own(name: str) -> Function | None:
    """A function that is not built in; None for a reward run."""
    return OWN.get(name) or (_imported(name) if ":" in name and not Path(name).is_dir() else None)


def sources_sha256(config: SampledConfig) -> str | None:
    """SHA-256 of what computes the rewards and is not built in, for a run's manifest; None if all is built in."""
    own = [name for name in config.reward if name not in BUILT_IN]
    return hashlib.sha256("\0".join(map(_source, own)).encode()).hexdigest() if own else None


def _source(name: str) -> str:
    """The hash of a reward run's adapter; the name of a function that only another process has."""
    if Path(name).is_dir():
        adapter = Path(name) / "adapter"
        return adapter_sha256(adapter) if adapter.exists() else name
    try:
        function = OWN.get(name) or _imported(name)
        own = inspect.isroutine(function)  # the text of another callable would be its address
        return source_of(function if own else getattr(function, "func", type(function)))
    except ConfigError:
        return name
