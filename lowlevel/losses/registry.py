"""Losses by name: built-in ones, custom ones (`@lowlevel.loss`), and "module:function", imported when it is used.

A custom loss has the form of a built-in one: the first argument holds log-probabilities (`PairLogps` for dpo and
online_dpo, `TokenLogps` for sft, `SampledLogps` for grpo, rloo and ppo), keyword-only arguments are its
hyper-parameters, and the result is one value for each pair or token, optionally with metrics of the same shape:

    @lowlevel.loss
    def shifted(pairs: PairLogps, *, beta: float, gamma: float = 1.0):
        return -logsigmoid(beta * pairs.deltas - gamma), {"shifted": (beta * pairs.deltas > gamma).float()}

With CUDA graphs the function only runs when a batch shape is captured: use tensors, without changing Python state, and
without waiting for the GPU (`.item()`, `if tensor:`). A loss that cannot be captured runs without graphs.
"""

import difflib
import hashlib
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from lowlevel.losses.token_logps import STATISTICS

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class LossSpec:
    """A loss: its function, its formula and paper as text, and the hyper-parameters that it reads."""

    name: str
    function: Callable[..., Any]
    formula: str
    paper: str
    parameters: tuple[str, ...]
    needs_lengths: bool = False
    averages: bool = False  # a reward is beta times the mean, not the sum, of a completion's log-probabilities
    needs_tokens: bool = False  # log-probabilities of single tokens, under the reference too
    needs_margin: bool = False  # a rated margin of each pair: data.columns
    reference_free: bool = False  # log-probabilities under the reference are 0, and there is no reference pass
    mixes_pairs: bool = False  # the loss of a pair depends on the other pairs of its micro-batch
    detaches: bool = False  # parts of the loss are without a gradient on purpose
    statistics: tuple[str, ...] = ()  # of the vocabulary at each token, which it reads: token_logps.STATISTICS
    average: str = "tokens"  # of sampled completions, how their tokens' losses are averaged: AVERAGES
    own: bool = False  # a custom loss

    @property
    def sha256(self) -> str | None:
        """SHA-256 of a custom loss's source, for a run's manifest; None for a built-in loss."""
        return hashlib.sha256(source_of(self.function).encode()).hexdigest() if self.own else None

    def __call__(self, logps: Any, settings: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each pair (P,) or token (N,), and metrics of the same shape, detached."""
        result = self.function(logps, **settings)
        losses, metrics = result if isinstance(result, tuple) else (result, {})
        return losses, {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}


def spec_of(function: Callable[..., Any], formula: str, paper: str = "", *, name: str = "", **needs: Any) -> LossSpec:
    """The description of a loss; its hyper-parameters are the function's keyword-only arguments."""
    keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return LossSpec(name or function.__name__, function, formula, paper, tuple(keywords), **needs)


AVERAGES = ("tokens", "sequences", "constant")  # policy_gradient.aggregation
OWN: dict[str, LossSpec] = {}  # filled by `loss`
BUILT_IN: set[str] = set()  # names that `loss` refuses, filled where losses are listed


@overload
def loss(
    function: Function, /, *, name: str = "", mixes_pairs: bool = False, detaches: bool = False,
    statistics: Sequence[str] = (), average: str = "tokens",
) -> Function: ...  # fmt: skip


@overload
def loss(
    *, name: str = "", mixes_pairs: bool = False, detaches: bool = False, statistics: Sequence[str] = (),
    average: str = "tokens",
) -> Callable[[Function], Function]: ...  # fmt: skip


def loss(
    function: Any = None, /, *, name: str = "", mixes_pairs: bool = False, detaches: bool = False,
    statistics: Sequence[str] = (), average: str = "tokens",
) -> Any:  # fmt: skip
    """Register a loss, so that the `loss_type` of a method can name it. Use it as a decorator.

    Args:
        function: see the module's docstring for its form.
        name: by default the function's name.
        mixes_pairs: the loss of a pair depends on the other pairs of its micro-batch.
        detaches: parts of the loss have no gradient on purpose: `lowlevel verify` does not compare its gradient with
            differences of its value.
        statistics: of the vocabulary at each token, which it reads from `statistics` of its first argument: "lse",
            "mean_logp", "log_square_sum" (see `lowlevel.losses.token_logps`).
        average: grpo, rloo, ppo: "tokens", the mean of all tokens of the step; "sequences", that of the completions'
            means; "constant", the sum divided by max_completion_length for each completion. A loss of whole
            completions returns `tokens.spread(losses)`, with "sequences".

    Raises:
        ValueError: a built-in loss has this name, or a statistic or an average does not exist.
    """
    for what, given, known in (("statistic", statistics, STATISTICS), ("average", [average], AVERAGES)):
        if unknown := [one for one in given if one not in known]:
            raise ValueError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")

    def register(given: Callable[..., Any]) -> Callable[..., Any]:
        needs: dict[str, Any] = {"mixes_pairs": mixes_pairs, "detaches": detaches, "average": average}
        spec = _own(given, name, statistics=tuple(statistics), **needs)
        if spec.name in BUILT_IN:
            raise ValueError(f"{spec.name!r} is a built-in loss: register yours under another name")
        OWN[spec.name] = spec
        return given

    return register if function is None else register(function)


def _own(function: Callable[..., Any], name: str, **needs: Any) -> LossSpec:
    formula = (inspect.getdoc(function) or "").split("\n")[0] or f"{function.__module__}.{function.__qualname__}"
    return spec_of(function, formula, "a loss of your own", name=name, own=True, **needs)


def name_of(function: Callable[..., Any]) -> str:
    """The name of a loss for run files: its registered name, or "module:function".

    Registers a function that other processes cannot import (of a notebook or script).
    """
    registered = next((spec.name for spec in OWN.values() if spec.function is function), None)
    if registered or (place := place_of(function, function.__qualname__)):
        return registered or place
    loss(function)
    return function.__name__


def place_of(function: Callable[..., Any], name: str) -> str:
    """Where another process can import a function, "module:name"; "" if nowhere."""
    module = function.__module__
    there = module != "__main__" and getattr(sys.modules.get(module), name, None) is function
    return f"{module}:{name}" if there else ""


def find(name: str, built_in: Mapping[str, LossSpec]) -> LossSpec:
    """The loss of a name. Raises ValueError: an unknown name, or a "module:function" that cannot be imported."""
    if name in built_in or name in OWN:
        return built_in.get(name) or OWN[name]
    if ":" in name:
        return _imported(name)
    known = [*built_in, *OWN]
    nearest = difflib.get_close_matches({"sft": "nll"}.get(name, name.lower()), known, n=1, cutoff=0.5)  # sft: TRL's
    hint = f"did you mean {nearest[0]!r}? `lowlevel losses` lists all" if nearest else f"known: {', '.join(known)}"
    custom = 'your own: import the module that registers it with @lowlevel.loss, or write "module:function"'
    raise ValueError(f"unknown loss_type {name!r}: {hint}; {custom}")


def _imported(name: str) -> LossSpec:
    function = imported(name, "loss_type")
    registered = next((spec for spec in OWN.values() if spec.function is function), None)
    return replace(registered, name=name) if registered else _own(function, name)


def imported(name: str, key: str) -> Any:
    """What "module:attribute" names, also in the current folder. ValueError: it cannot be imported; `key` has it."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # the command line does not add it
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's and may raise anything
        raise ValueError(f"{key} {name!r} cannot be imported: {type(error).__name__}: {error}") from None


def source_of(function: Callable[..., Any]) -> str:
    """The function's source text, or its compiled code if Python does not have the source."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return repr((code.co_code, code.co_consts, code.co_names)) if code else repr(function)


def check_result(spec: LossSpec, logps: Any, settings: Mapping[str, Any], leaf: Tensor, *, size: int) -> None:
    """Try a custom loss on a few made-up log-probabilities, before a model is loaded.

    Args:
        leaf: the log-probabilities from which `logps` is computed, with requires_grad; its graph is kept.
        size: pairs or tokens; loss and metrics must be (size,).

    Raises:
        ValueError: it raises, returns another shape or type, names a metric "loss", or its gradient is missing, NaN or
            infinite.
    """
    what = f"loss_type {spec.name!r}"
    try:
        result = spec(logps, settings)
    except Exception as error:
        raise ValueError(f"{what} failed on a trial batch: {type(error).__name__}: {error}") from error
    if "loss" in result[1]:
        raise ValueError(f"{what}: a metric is named 'loss', as the loss itself: give it another name")
    for name, value in {"loss": result[0], **result[1]}.items():
        if not isinstance(value, Tensor) or value.shape != (size,):
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{what}: {name!r} is {found}, expected a tensor of shape ({size},), one value each")
    if not result[0].requires_grad:
        raise ValueError(f"{what} has no gradient: compute it from the tensors that it is given")
    (slopes,) = torch.autograd.grad(result[0].sum(), leaf, allow_unused=True, retain_graph=True)
    if slopes is not None and not bool(slopes.isfinite().all()):
        raise ValueError(f"{what} has a gradient that is NaN or infinite on a trial batch: {slopes.tolist()}")
