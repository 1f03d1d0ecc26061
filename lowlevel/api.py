"""The Python API: train a run, take its steps one by one, and look into it afterwards (`Run`, in run.py).

    import lowlevel as ll

    run = ll.sft(model="HuggingFaceTB/SmolLM2-135M-Instruct", data=rows, output_dir="out/a", max_steps=50)
    run = ll.dpo(model="HuggingFaceTB/SmolLM2-135M-Instruct", data=pairs, adapter=run, output_dir="out/b", beta=0.2)
    run.metrics[-1], run.inspect(step=1).examples[0].numbers["margin"], run.verify()

Keywords become the keys of a run file (`configure`), and `train` takes the same steps as the command line.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from difflib import get_close_matches
from inspect import isroutine, signature
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from rich.console import Console

from lowlevel.config.file import OTHER_NAMES, config_from_tables, load_tables
from lowlevel.config.given import GivenRows, source_of
from lowlevel.config.schema import SECTIONS, RunConfig, other_section, sections_of
from lowlevel.errors import ConfigError, errors_for_python, quoted
from lowlevel.launching import is_first
from lowlevel.losses.registry import name_of
from lowlevel.online import rewards
from lowlevel.optim.train_state import StepResult
from lowlevel.run import Run
from lowlevel.running.callbacks import Callback
from lowlevel.running.progress import make_console, quiet_libraries, speaking
from lowlevel.running.training import returned, run_steps

Model = str | Path | None  # a hub name or a folder
Rows = Any  # a path or hub name, or rows: dicts, a datasets.Dataset, a torch Dataset
Adapter = Run | str | Path | None
Reward = Run | str | Callable[..., Any] | Sequence[Run | str | Callable[..., Any]] | None


def sft(model: Model = None, data: Rows = None, **settings: Any) -> Run:
    """Supervised fine-tuning of a model on conversations.

    Args:
        model: hub name, local folder, or "demo" (the built-in base, the default): `model.name` of a run file.
        data: a file, a hub name, or rows given as a list of dicts, a `datasets.Dataset` or a `torch.utils.data.Dataset`
            of dicts, each with "messages" or "prompt" and "completion" (lowlevel/data/README.md). Default: the demo's.
        **settings: see `train`.

    Returns:
        The finished run.

    Raises:
        LowlevelError: ConfigError, DataError, CheckpointError, NonFiniteError, OutOfMemoryError; the text says what to
            do.
    """
    return train("sft", model=model, data=data, **settings)


def dpo(model: Model = None, data: Rows = None, *, adapter: Adapter = None, **settings: Any) -> Run:
    """Direct Preference Optimization (arXiv 2305.18290) on pairs of a chosen and a rejected completion.

    Args:
        model: as in `sft`.
        data: as in `sft`; rows with "prompt", "chosen" and "rejected".
        adapter: the run or PEFT folder to start from. It stays, frozen, under the new adapter, and is the reference.
        **settings: see `train`.
    """
    return train("dpo", model=model, data=data, adapter=adapter, **settings)


def kto(model: Model = None, data: Rows = None, *, adapter: Adapter = None, **settings: Any) -> Run:
    """Kahneman-Tversky Optimization (arXiv 2402.01306) on completions with a label, desirable or not.

    Arguments as in `dpo`; the rows have "prompt", "completion" and "label", or are pairs, which give two such rows.
    """
    return train("kto", model=model, data=data, adapter=adapter, **settings)


def reward(model: Model = None, data: Rows = None, *, adapter: Adapter = None, **settings: Any) -> Run:
    """A reward model on preference pairs (Bradley-Terry, arXiv 2203.02155); `Run.score` gives its rewards.

    Arguments as in `dpo`.
    """
    return train("reward", model=model, data=data, adapter=adapter, **settings)


def grpo(
    model: Model = None, data: Rows = None, *, reward: Reward = None, adapter: Adapter = None, **settings: Any
) -> Run:
    """Group-relative policy optimisation (arXiv 2402.03300) and its family, by `loss_type`; it samples completions.

    Args:
        model: as in `sft`.
        data: as in `sft`; rows of which only the prompt is needed. A last reply is the reference of reward functions.
        reward: one or several reward functions: names, reward runs or their folders, "module:function", or functions
            (lowlevel/online/rewards.py says with what they are called).
        adapter: as in `dpo`.
        **settings: see `train`.
    """
    return train("grpo", model=model, data=data, reward=reward, adapter=adapter, **settings)


def rloo(model: Model = None, data: Rows = None, **settings: Any) -> Run:
    """REINFORCE with the other completions of a prompt as baseline (RLOO, arXiv 2402.14740). Arguments as in `grpo`."""
    return train("rloo", model=model, data=data, **settings)


def ppo(model: Model = None, data: Rows = None, **settings: Any) -> Run:
    """Proximal policy optimisation (arXiv 1707.06347) with a value head. Arguments as in `grpo`."""
    return train("ppo", model=model, data=data, **settings)


def online_dpo(model: Model = None, data: Rows = None, **settings: Any) -> Run:
    """DPO on the best and the worst of sampled completions (arXiv 2402.04792). Arguments as in `grpo`."""
    return train("online_dpo", model=model, data=data, **settings)


def train(
    method: str | RunConfig,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    restart: bool = False,
    allow_change: str | Sequence[str] = (),
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Train a run and return it.

    Args:
        method: "sft", "dpo", "kto", "reward", "grpo", "rloo", "ppo", "online_dpo", or a resolved configuration and then
            no settings.
        callbacks: `lowlevel.Callback` objects, whose methods are called at each step, log line, evaluation, checkpoint
            and at the end.
        resume: continue the run in `output_dir` from its newest good checkpoint, with the same data and settings.
        restart: discard the run in `output_dir`.
        allow_change: with `resume`, one or several names of what may differ from the checkpoint: "learning_rate".
        console: where progress is printed; `rich.console.Console(quiet=True)` prints nothing.
        **settings: see `configure`.

    Raises:
        LowlevelError: as in `sft`.
    """
    options = {"resume": resume, "restart": restart, "allow_change": allow_change, "details": bool(callbacks)}
    return returned(_steps(_config(method, settings), console, callbacks, options))


def steps(
    method: str | RunConfig, *, callbacks: Sequence[Callback] = (), console: Console | None = None, **settings: Any
) -> Iterator[StepResult]:
    """Train a run step by step: yield each optimizer step after its update, with everything it was computed from.

        for result in ll.steps("dpo", data=pairs, output_dir="out/c", max_steps=20):
            print(result.step, result.loss, result.grad_norm, result.examples["rewards/margins"])

    Leaving the loop saves a checkpoint: `resume=True` continues there. Arguments and errors are those of `train`.
    """
    names = ("resume", "restart", "allow_change")
    options = {name: settings.pop(name) for name in names if name in settings}
    taken = _steps(_config(method, settings), console, callbacks, {**options, "details": True})
    atexit.register(_leave, ref(taken))
    return taken


def _leave(taken: ref[Generator[StepResult, None, Run]]) -> None:
    """When the program ends: save a run whose steps were taken by `next`, and not all."""
    if left := taken():
        left.close()


def configure(
    method: str,
    *,
    file: str | Path | None = None,
    model: Model = None,
    data: Rows = None,
    eval_data: Rows = None,
    adapter: Adapter = None,
    loss: str | Callable[..., Any] | None = None,
    reward: Reward = None,
    **settings: Any,
) -> RunConfig:
    """The configuration of a run from keyword arguments, checked as a run file is.

    Args:
        method: "sft", "dpo", "kto", "reward", "grpo", "rloo", "ppo" or "online_dpo".
        file: a run file (TOML) whose keys the other arguments replace.
        model: `model.name`.
        data: `data.source`, or rows.
        eval_data: `data.eval_source`, or rows; "holdout" keeps `eval_limit` rows of `data` out of training.
        adapter: `model.adapter`.
        loss: the name of a loss, or a function in the form that `lowlevel.loss` describes.
        reward: as in `grpo`.
        **settings: every key of a run file by its name (`max_steps=50, r=16, beta=0.2`), or several keys of a section
            other than model and data (`trace={"every": 1}`); `lowlevel sft --help` lists them.

    Raises:
        ConfigError: one line for each problem.
    """
    for given, folder in (("model", model), ("adapter", adapter)):
        if not isinstance(folder, str | Path | Run | None):
            raise ConfigError(f"{given}: got a {type(folder).__name__}, expected a hub name or a folder")
    if callable(loss) and not isroutine(loss):
        raise ConfigError(f"loss: got a {type(loss).__name__}, expected a function; loss_kwargs sets its keywords")
    tables: dict[str, Any] = load_tables(Path(file), method) if file else {"method": method}
    named = {
        "model.name": model,
        "model.adapter": str(adapter.path) if isinstance(adapter, Run) else adapter and str(adapter),
        "data.source": source_of(data),
        "data.eval_source": source_of(eval_data),
        f"{method}.loss_type": name_of(loss) if callable(loss) else loss,
        f"{method}.reward": _reward_names(reward),
    }
    for key, value in settings.items():
        if key in SECTIONS and isinstance(value, Mapping):
            tables[key] = {**tables.get(key, {}), **value}
        else:
            named[f"{_section_of(key, method)}.{key}"] = str(value) if isinstance(value, Path) else value
    for name, value in named.items():
        section, _, key = name.partition(".")
        if value is not None:
            tables[section] = {**tables.get(section, {}), key: value}
    return config_from_tables(tables, "settings")


def _reward_names(reward: Reward) -> list[str] | None:
    if reward is None:
        return None
    given = [reward] if isinstance(reward, Run | str) or callable(reward) else reward
    if not isinstance(given, Sequence) or not all(isinstance(one, Run | str) or callable(one) for one in given):
        raise ConfigError(f"reward: expected names or functions, got {quoted(repr(reward))}")
    return [str(x.path) if isinstance(x, Run) else rewards.name_of(x) if callable(x) else x for x in given]


def _section_of(key: str, method: str) -> str:
    """The section of a key; methods share keys: its own. Raises ConfigError for unknown keys."""
    sections = {key: name for name, section in sections_of(method).items() for key in section.model_fields}
    if key not in sections:
        known = [*sections, *signature(configure).parameters, *signature(train).parameters]
        near = [OTHER_NAMES[key]] if key in OTHER_NAMES else get_close_matches(key, known, n=1, cutoff=0.6)
        near = [{"source": "data", "eval_source": "eval_data", "name": "model"}.get(one, one) for one in near]
        hint = f'did you mean "{near[0]}"?' if near else f"`lowlevel {method} --help` lists the keys"
        raise ConfigError(f'settings: unknown key "{quoted(key)}"; {other_section(key, method) or hint}')
    return sections[key]


def _config(method: str | RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    if isinstance(method, str):
        return configure(method, **settings)
    if settings:
        raise ConfigError(f"a resolved configuration takes no settings, got {', '.join(settings)}")
    return method


def _steps(
    config: RunConfig, console: Console | None, callbacks: Sequence[Callback], options: Mapping[str, Any]
) -> Generator[StepResult, None, Run]:
    """The steps of `run_steps`, then the run."""
    if not isinstance(callbacks, Sequence) or not all(isinstance(one, Callback) for one in callbacks):
        raise ConfigError(f"callbacks: expected a list of lowlevel.Callback objects, got {quoted(repr(callbacks))}")
    _check_torch()
    if isinstance(allowed := options.get("allow_change"), str):
        options = {**options, "allow_change": [allowed]}
    quiet_libraries()
    console = (console or make_console()) if is_first() else Console(quiet=True)
    taken = run_steps(config, console, callbacks=callbacks, **options)
    with errors_for_python(), speaking(console, config.method) as beat, closing(taken):
        for step in taken:
            with beat.pause():
                yield step
    given = {"data": config.data.source, "eval_data": config.data.eval_source}
    run = Run(config.train.output_dir, **{name: rows for name, rows in given.items() if isinstance(rows, GivenRows)})
    for callback in callbacks if is_first() else ():
        callback.on_end(run)
    return run


def _check_torch() -> None:
    """Refuse what a program may have set in torch, and with which a run would fail or compute other numbers."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    wrong = ["gradients are off"] * (not torch.is_grad_enabled())
    wrong += ["autocast is on"] * (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))
    wrong += [f"the default dtype is {dtype}"] * (dtype != torch.float32)
    wrong += [f"the default device is {device}"] * (device.type != "cpu")
    if wrong:
        raise ConfigError(f"torch: {', '.join(wrong)}; set it back before a run")
