"""A run folder in Python: its numbers, and its model opened again to inspect, check, repeat, generate and score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from lowlevel.checkpoints.checkpoint import saved
from lowlevel.config.given import rows_of, source_of
from lowlevel.errors import ConfigError, errors_for_python
from lowlevel.model.files import read_json_object
from lowlevel.model.policy import Policy
from lowlevel.running.progress import make_console, speaking
from lowlevel.running.reopening import Reopened, reopen, with_rows
from lowlevel.running.run_folder import RunFolder

if TYPE_CHECKING:
    from lowlevel.inspection.example import Inspection
    from lowlevel.replaying.report import Replay
    from lowlevel.verification.report import Report

Result = TypeVar("Result")
Options = ParamSpec("Options")


def _long(work: Callable[Options, Result]) -> Callable[Options, Result]:
    """Print where long work is, as the commands do; errors name keywords instead of flags."""

    @wraps(work)
    def wrapped(*arguments: Options.args, **named: Options.kwargs) -> Result:
        with errors_for_python(), speaking(make_console(), work.__name__):
            return work(*arguments, **named)

    return wrapped


class Run:
    """A run folder, finished or not: its numbers, and its model opened again."""

    def __init__(self, path: str | Path, *, data: Any = None, eval_data: Any = None) -> None:
        """Open a run folder. Give the rows again if the run got them in Python."""
        self.path = Path(path)
        self.folder = RunFolder(self.path)
        self._data, self._eval_data = rows_of(data), rows_of(eval_data)
        self.config = with_rows(self.folder.read_config(), self._data, self._eval_data)
        self._loaded: dict[tuple[object, ...], Any] = {}

    def __repr__(self) -> str:
        last = next((f", loss {record['loss']:z.4f}" for record in reversed(self.metrics) if "loss" in record), "")
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

    @property
    def policy(self) -> Policy:
        """The model with the run's newest adapter for forward passes; kept until the run has a newer one."""
        return self._of_newest("policy", self.opened.policy)

    def _of_newest(self, name: str, load: Callable[[Path | None], Result]) -> Result:
        """What `load` makes of the newest adapter, kept by `name` until there is a newer one: the run may go on."""
        adapter = self.folder.newest_adapter(print)
        key = name, adapter, adapter and adapter.stat().st_mtime_ns
        if key not in self._loaded:
            self._loaded = {other: kept for other, kept in self._loaded.items() if other[0] != name}
            self._loaded[key] = load(adapter)
        return cast(Result, self._loaded[key])

    @_long
    def inspect(
        self, *, step: int | None = None, example: int | None = None, checkpoint: int | None = None
    ) -> Inspection:
        """The examples of a step, or one data row, taken apart: the columns of each token, and the way to the loss.

        Args:
            step: optimizer step, counted from 1.
            example: data row.
            checkpoint: weights of checkpoint step-K, 0: before the first step. Default: the newest before the step, or
                the final adapter.
        """
        from lowlevel.inspection.opening import inspect_run

        return inspect_run(self.opened, step=step, example=example, checkpoint=checkpoint)

    @_long
    def verify(self, *, step: int = 1, exact_parameters: int = 500_000_000) -> Report:
        """Check a step in float64, where a base of up to `exact_parameters` weights runs too; `print()` shows it."""
        from lowlevel.verification.opening import verify_run

        return verify_run(self.opened, step=step, exact_parameters=exact_parameters)

    @_long
    def replay(
        self, step: int, *, start: int | None = None, what_if: Mapping[str, str | float] | Sequence[str] | None = None
    ) -> Replay:
        """Take a step again, from checkpoint `start` or the newest one before it, and compare it with the log.

        `what_if`, {"beta": 0.3}, "beta=0.3" or several such texts: take it under these too.
        """
        from lowlevel.replaying.replay import replay_run

        if isinstance(what_if, Mapping):
            what_if = ",".join(f"{name}={value}" for name, value in what_if.items())
        settings = [what_if] if isinstance(what_if, str) else what_if or []
        return replay_run(self.opened, step, start=start, settings=list(filter(None, settings)))

    @_long
    def compare(self, *, prompts: int = 16, max_new_tokens: int = 128, show: int = 3) -> dict[str, Any]:
        """What `lowlevel compare` prints: base, SFT and DPO on the held-out rows, of which they reply to `prompts`."""
        from lowlevel.reporting.comparison import compare_run

        sizes = {"prompts": prompts, "max_new_tokens": max_new_tokens, "show": show}
        return compare_run(self.path, make_console(), **sizes, data=self._data, eval_data=self._eval_data)

    @_long
    def generate(self, prompt: str, *, system: str | None = None, max_new_tokens: int = 256, temperature: float = 0.0,
                 seed: int = 0) -> str:  # fmt: skip
        """Reply to a prompt with the run's adapter, of an unfinished run its newest checkpoint's.

        Args:
            prompt: what the user says.
            system: a system message before it.
            max_new_tokens: longest reply.
            temperature: of the sampling with `seed`; 0 takes the likeliest token.
        """
        from lowlevel.running.replies import generate_replies, load_for_replies, question
        from lowlevel.sampling import Sampling

        if not isinstance(prompt, str):
            raise ConfigError(f"prompt: got a {type(prompt).__name__}, expected a text")
        sampler, tokenizer = self._of_newest("replies", lambda own: load_for_replies(own or self.path, print))
        ids = tokenizer.encode_prompt(question(prompt, system))
        return generate_replies(sampler, tokenizer, [ids], Sampling(max_new_tokens, temperature, seed))[0].text

    def score(self, rows: Any, *, split: str = "test") -> list[dict[str, Any]]:
        """The rewards of a reward run for rows, one dict each; `pandas.DataFrame` makes a table of them.

        Args:
            rows: pairs ("prompt", "chosen", "rejected"), "prompt" and "completion", or "messages"; or a file's path.
            split: of a hub data set.
        """
        from lowlevel.running.scoring import load_reward_run, score_source

        source = source_of(rows)
        if source is None:
            raise ConfigError("score: no rows were given")
        model = self._of_newest("scores", lambda _: load_reward_run(self.path, print))
        return [one.as_json() for one in score_source(model, source, split)]

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the result (adapter, tokenizer, model card) to the hub and return its address.

        Args:
            repo_id: "user/name".
            private: whether a new repository is private.
            token: of the hub; None: the logged-in user's.
        """
        from lowlevel.running.result_files import push_to_hub

        return push_to_hub(self.path, repo_id, private=private, token=token)
