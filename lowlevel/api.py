"""The Python API: train a run, take its steps one by one, and look into it afterwards.

    import lowlevel as ll

    run = ll.sft(model="HuggingFaceTB/SmolLM2-135M-Instruct", data=rows, output_dir="out/a", max_steps=50)
    run = ll.dpo(model="HuggingFaceTB/SmolLM2-135M-Instruct", data=pairs, adapter=run, output_dir="out/b", beta=0.2)
    run.metrics[-1], run.inspect(step=1).pairs[0].margin, run.verify()

The command line calls the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from difflib import get_close_matches
from functools import cached_property, wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from rich.console import Console

from lowlevel.checkpoints.checkpoint import saved
from lowlevel.config.file import OTHER_NAMES, config_from_tables, load_tables
from lowlevel.config.given import GivenRows
from lowlevel.config.schema import METHODS, SECTIONS, RunConfig
from lowlevel.errors import ConfigError, errors_for_python, quoted
from lowlevel.losses.registry import name_of
from lowlevel.model.files import read_json_object
from lowlevel.model.policy import Policy
from lowlevel.online import rewards
from lowlevel.optim.train_state import StepResult
from lowlevel.ranks import is_first
from lowlevel.running.callbacks import Callback
from lowlevel.running.progress import make_console, quiet_libraries, speaking
from lowlevel.running.reopening import Reopened, reopen, with_rows
from lowlevel.running.run import run_steps
from lowlevel.running.run_folder import RunFolder

if TYPE_CHECKING:
    from lowlevel.inspection.inspection import Inspection
    from lowlevel.replaying.report import Replay
    from lowlevel.verification.report import Report

Rows = Any  # a path or hub name, or rows: dicts, a datasets.Dataset, a torch Dataset
Reward = str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None
Result = TypeVar("Result")
Options = ParamSpec("Options")


def sft(model: str | Path | None = None, data: Rows = None, **settings: Any) -> Run:
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


def dpo(
    model: str | Path | None = None, data: Rows = None, *, adapter: Run | str | Path | None = None, **settings: Any
) -> Run:
    """Direct Preference Optimization (arXiv 2305.18290) on pairs of a chosen and a rejected completion.

    Args:
        model: as in `sft`.
        data: as in `sft`; rows with "prompt", "chosen" and "rejected".
        adapter: the run or PEFT folder to start from. It stays, frozen, under the new adapter, and is the reference.
        **settings: see `train`.
    """
    return train("dpo", model=model, data=data, adapter=adapter, **settings)


def kto(
    model: str | None = None, data: Rows = None, *, adapter: Run | str | Path | None = None, **settings: Any
) -> Run:
    """Kahneman-Tversky Optimization (arXiv 2402.01306) on completions with a label, desirable or not.

    Args:
        model: as in `sft`.
        data: as in `sft`; rows with "prompt", "completion" and "label", or pairs as in `dpo`, two rows each.
        adapter: as in `dpo`.
        **settings: see `train`.
    """
    return train("kto", model=model, data=data, adapter=adapter, **settings)


def reward(
    model: str | None = None, data: Rows = None, *, adapter: Run | str | Path | None = None, **settings: Any
) -> Run:
    """A reward model on preference pairs (Bradley-Terry, arXiv 2203.02155); `Run.score` gives its rewards.

    Args:
        model: as in `sft`.
        data: as in `dpo`.
        adapter: as in `dpo`.
        **settings: see `train`.
    """
    return train("reward", model=model, data=data, adapter=adapter, **settings)


def grpo(
    model: str | None = None,
    data: Rows = None,
    *,
    reward: Reward = None,
    adapter: Run | str | Path | None = None,
    **settings: Any,
) -> Run:
    """Group-relative policy optimisation (arXiv 2402.03300) and its family, by `loss_type`; it samples completions.

    Args:
        model: as in `sft`.
        data: as in `sft`; rows of which only the prompt is needed. A last reply is the reference of reward functions.
        reward: one or several reward functions: names, folders of reward runs, "module:function", or functions
            (lowlevel/online/rewards.py says with what they are called).
        adapter: as in `dpo`.
        **settings: see `train`.
    """
    return train("grpo", model=model, data=data, reward=reward, adapter=adapter, **settings)


def rloo(
    model: str | None = None,
    data: Rows = None,
    *,
    reward: Reward = None,
    adapter: Run | str | Path | None = None,
    **settings: Any,
) -> Run:
    """REINFORCE with the other completions of a prompt as baseline (RLOO, arXiv 2402.14740). Arguments as in `grpo`."""
    return train("rloo", model=model, data=data, reward=reward, adapter=adapter, **settings)


def ppo(
    model: str | None = None,
    data: Rows = None,
    *,
    reward: Reward = None,
    adapter: Run | str | Path | None = None,
    **settings: Any,
) -> Run:
    """Proximal policy optimisation (arXiv 1707.06347) with a value head. Arguments as in `grpo`."""
    return train("ppo", model=model, data=data, reward=reward, adapter=adapter, **settings)


def online_dpo(
    model: str | None = None,
    data: Rows = None,
    *,
    reward: Reward = None,
    adapter: Run | str | Path | None = None,
    **settings: Any,
) -> Run:
    """DPO on the best and the worst of sampled completions (arXiv 2402.04792). Arguments as in `grpo`."""
    return train("online_dpo", model=model, data=data, reward=reward, adapter=adapter, **settings)


def train(
    method: str | RunConfig,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    restart: bool = False,
    allow_change: Sequence[str] = (),
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Train a run and return it.

    Args:
        method: "sft", "dpo", "kto", "reward", "grpo", "rloo", "ppo", "online_dpo", or a resolved configuration and then
            no settings.
        callbacks: objects whose methods are called at each step, log line, evaluation, checkpoint and at the end.
        resume: continue the run in `output_dir` from its newest good checkpoint, with the same data and settings.
        restart: discard the run in `output_dir`.
        allow_change: with `resume`, names of what may differ from the checkpoint, as the refusal prints them.
        console: where progress is printed; `rich.console.Console(quiet=True)` prints nothing.
        **settings: see `configure`.

    Raises:
        LowlevelError: as in `sft`.
    """
    options = {"callbacks": callbacks, "resume": resume, "restart": restart, "allow_change": allow_change}
    by_command = isinstance(method, RunConfig)
    taken = _taken(_config(method, settings), console, options, by_command=by_command)
    while True:
        try:
            next(taken)
        except StopIteration as end:
            run: Run = end.value
            return run


def steps(method: str | RunConfig, **settings: Any) -> Iterator[StepResult]:
    """Train a run step by step: yield each optimizer step after its update, with everything it was computed from.

        for step in ll.steps("dpo", data=pairs, output_dir="out/c", max_steps=20):
            print(step.number, step.loss, step.grad_norm, step.examples["rewards/margins"])

    Leaving the loop saves a checkpoint: `resume=True` continues there. Arguments and errors are those of `train`.
    """
    names = ("callbacks", "resume", "restart", "allow_change")
    options = {name: settings.pop(name) for name in names if name in settings}
    console = settings.pop("console", None)
    return _taken(_config(method, settings), console, {**options, "details": True})


def configure(
    method: str,
    *,
    file: str | Path | None = None,
    model: str | Path | None = None,
    data: Rows = None,
    eval_data: Rows = None,
    adapter: Run | str | Path | None = None,
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
    tables: dict[str, Any] = load_tables(Path(file), method) if file else {"method": method}
    named = {
        "model.name": model,
        "model.adapter": str(adapter.path) if isinstance(adapter, Run) else adapter and str(adapter),
        "data.source": _source(data),
        "data.eval_source": _source(eval_data),
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
    given = [reward] if isinstance(reward, str) or callable(reward) else reward
    if not isinstance(given, Sequence) or not all(isinstance(one, str) or callable(one) for one in given):
        raise ConfigError(f"reward: expected names or functions, got {quoted(repr(reward))}")
    return [rewards.name_of(one) if callable(one) else one for one in given]


def _section_of(key: str, method: str) -> str:
    """The section of a key; methods share keys: its own. Raises ConfigError for unknown keys."""
    own = {name: section for name, section in SECTIONS.items() if name not in METHODS or name == method}
    sections = {key: name for name, section in own.items() for key in section.model_fields}
    if key not in sections:
        known = [*sections, *signature(configure).parameters, *signature(train).parameters]
        near = [OTHER_NAMES[key]] if key in OTHER_NAMES else get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"`lowlevel {method} --help` lists the keys"
        raise ConfigError(f'settings: unknown key "{quoted(key)}"; {hint}')
    return sections[key]


def _source(data: Rows) -> str | GivenRows | None:
    return str(data) if isinstance(data, str | Path) else _rows(data)


def _rows(data: Rows) -> GivenRows | None:
    return None if data is None else GivenRows.of(data)


def _config(method: str | RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    if isinstance(method, str):
        return configure(method, **settings)
    if settings:
        raise ConfigError(f"a resolved configuration takes no settings, got {', '.join(settings)}")
    return method


def _taken(config: RunConfig, console: Console | None, options: Mapping[str, Any], *, by_command: bool = False) -> Any:
    """A generator over the steps that returns the run: the one way in, of the command line too."""
    quiet_libraries()
    console = (console or make_console()) if is_first() else Console(quiet=True)
    details = options.get("details", False) or bool(options.get("callbacks"))
    taken = run_steps(config, console, **{**options, "details": details})
    words = nullcontext() if by_command else errors_for_python()
    with words, speaking(console, config.method) as beat, closing(taken):
        for step in taken:
            with beat.pause():
                yield step
    sources = {"data": config.data.source, "eval_data": config.data.eval_source}
    run = Run(config.train.output_dir, **{k: v for k, v in sources.items() if isinstance(v, GivenRows)})
    for callback in options.get("callbacks", ()) if is_first() else ():
        callback.on_end(run)
    return run


def _long(work: Callable[Options, Result]) -> Callable[Options, Result]:
    """Outside a terminal, print where the work is, as the commands do; errors name keywords instead of flags."""

    @wraps(work)
    def wrapped(*arguments: Options.args, **named: Options.kwargs) -> Result:
        with errors_for_python(), speaking(make_console(), work.__name__):
            return work(*arguments, **named)

    return wrapped


class Run:
    """A run folder, finished or not: its numbers, and its model opened again."""

    def __init__(self, path: str | Path, *, data: Rows = None, eval_data: Rows = None) -> None:
        """Open a run folder. Give the rows again if the run got them in Python."""
        self.path = Path(path)
        self.folder = RunFolder(self.path)
        self._data, self._eval_data = _rows(data), _rows(eval_data)
        self.config = with_rows(self.folder.read_config(), self._data, self._eval_data)

    def __repr__(self) -> str:
        last = next((f", loss {record['loss']:.4f}" for record in reversed(self.metrics) if "loss" in record), "")
        step = max([0, *(record["step"] for record in self.metrics), *saved(self.path)])
        return f"Run({str(self.path)!r}: {self.config.method}, step {step}{last}, {self.folder.read_state()})"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged records, oldest first; `pandas.DataFrame(run.metrics)` makes a table of them."""
        return self.folder.read_metrics()

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: runtime, mean loss, tokens; empty before the run has finished."""
        file = self.path / "summary.json"
        return read_json_object(file) if file.exists() else {}

    @cached_property
    def opened(self) -> Reopened:
        """The run reopened: configuration, manifest, placement; its rows and model are loaded when asked for."""
        return reopen(self.path, data=self._data, eval_data=self._eval_data)

    @cached_property
    def policy(self) -> Policy:
        """The model with the run's newest adapter, loaded for forward passes when first asked for."""
        return self.opened.policy(self.folder.newest_adapter(print))

    @_long
    def inspect(
        self, *, step: int | None = None, example: int | None = None, checkpoint: int | None = None
    ) -> Inspection:
        """The examples of a step, or one data row, taken apart: tensors by token and by pair.

        Args:
            step: optimizer step, counted from 1.
            example: data row.
            checkpoint: weights of checkpoint step-K, 0: before the first step. Default: the newest before the step, or
                the final adapter.
        """
        from lowlevel.inspection.opening import inspect_run

        return inspect_run(self.opened, step=step, example=example, checkpoint=checkpoint)

    @_long
    def verify(self, *, step: int = 1, **options: Any) -> Report:
        """Check a step of the run against its formula in float64; `print()` shows the table."""
        from lowlevel.verification.opening import verify_run

        return verify_run(self.opened, step=step, **options)

    @_long
    def replay(self, step: int, *, start: int | None = None) -> Replay:
        """Take a step again, from checkpoint `start` or the newest one before it, and compare it with the log."""
        from lowlevel.replaying.replay import replay_run

        return replay_run(self.opened, step, start=start)

    @_long
    def generate(self, prompt: str, *, system: str | None = None, **sampling: Any) -> str:
        """Reply to a prompt with the run's adapter, of an unfinished run its newest checkpoint's.

        Args:
            prompt: what the user says.
            system: a system message before it.
            **sampling: max_new_tokens=256, temperature=0.0 (the likeliest token), seed=0.
        """
        from lowlevel.running.replies import generate_replies
        from lowlevel.sampling import Sampling

        sampler, tokenizer = self._for_replies
        system_message = [{"role": "system", "content": system}] if system is not None else []
        ids = tokenizer.encode_prompt([*system_message, {"role": "user", "content": prompt}])
        return generate_replies(sampler, tokenizer, [ids], Sampling(**sampling))[0].text

    @cached_property
    def _for_replies(self) -> Any:
        from lowlevel.running.replies import load_for_replies

        return load_for_replies(self.folder.newest_adapter(print) or self.path, print)

    def score(self, rows: Rows | str | Path, *, split: str = "test") -> list[dict[str, Any]]:
        """The rewards of a reward run for rows, one dict each; `pandas.DataFrame` makes a table of them.

        Args:
            rows: pairs ("prompt", "chosen", "rejected"), "prompt" and "completion", or "messages"; or a file's path.
            split: of a hub data set.
        """
        from lowlevel.running.scoring import score_source

        source = _source(rows)
        if source is None:
            raise ConfigError("score: no rows were given")
        return [one.as_json() for one in score_source(self._for_scores, source, split)]

    @cached_property
    def _for_scores(self) -> Any:
        from lowlevel.running.scoring import load_reward_run

        return load_reward_run(self.path, print)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the result (adapter, tokenizer, model card) to the hub and return its address.

        Args:
            repo_id: "user/name".
            **options: private=True, token=None (default: the logged-in user's), endpoint=None.
        """
        from lowlevel.running.result_files import push_to_hub

        result = self.folder.stacked if self.folder.stacked.exists() else self.folder.adapter
        return push_to_hub(result, repo_id, **options)
