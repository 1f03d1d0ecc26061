"""The rollouts of a step: completions that the policy sampled, with what each token's loss is computed from.

They are kept in the run folder's rollouts/ as parquet, a row for each completion, written at checkpoints:

    step row sample              the step that sampled, counted from 1; data row; number in its group
    prompt_ids completion_ids    tokens; with the stop token, if the completion `ended`
    text reward reward/NAME      what was rewarded, the weighted sum, and each function's part; NaN: it failed
    logps advantages values/...  of each token: what the sampler and the method computed
    counted                      whether it is in the loss

A step that is replayed, inspected, or repeated by num_iterations reads them instead of sampling again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from lowlevel.checkpoints.tables import read_table, steps_of, write_table
from lowlevel.config.schema import RunConfig
from lowlevel.data.examples import PreferenceExample, PromptExample
from lowlevel.errors import CheckpointError
from lowlevel.labels import IGNORED
from lowlevel.running.run_folder import RunFolder

MOST = 10_000  # completions held on the host before they are written between two checkpoints


@dataclass(frozen=True, eq=False)
class Rollout:
    """One completion of n tokens to a prompt of p tokens."""

    row: int
    where: str
    group: int  # number of the prompt in the step
    sample: int  # number in its group
    prompt_ids: np.ndarray  # (p,) int32
    completion_ids: np.ndarray  # (n,) int32
    text: str
    ended: bool
    logps: np.ndarray  # (n,) fp32, by the sampler
    rewards: Mapping[str, float] = field(default_factory=dict)  # by function; NaN: it failed
    reward: float = math.nan  # weighted sum
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # (n,) fp32
    values: Mapping[str, np.ndarray] = field(default_factory=dict)  # (n,) fp32 each: what else the method needs
    counted: bool = True

    @property
    def input_ids(self) -> np.ndarray:
        """Prompt and completion, (p + n,) int32."""
        return np.concatenate([self.prompt_ids, self.completion_ids])

    @property
    def labels(self) -> np.ndarray:
        """Labels as in sft: only the completion's tokens have one."""
        return np.concatenate([np.full(len(self.prompt_ids), IGNORED, np.int32), self.completion_ids])


ARRAYS = {"prompt_ids": np.int32, "completion_ids": np.int32, "logps": np.float32, "advantages": np.float32}
COLUMNS = [part.name for part in fields(Rollout) if part.name not in ("rewards", "values")]


def step_examples(config: RunConfig, rollouts: Sequence[Rollout]) -> list[Any]:
    """What the method of a run takes: the completions, or a pair of each prompt's."""
    if config.method == "online_dpo":
        return pairs_of(rollouts, masked=config.online_dpo.mask_truncated_completions)
    return list(rollouts)


def longest_examples(config: RunConfig, prompts: Sequence[PromptExample]) -> list[Any]:
    """Made-up examples of the largest step: the longest prompts, and completions of the maximal length."""
    own, found = config.sampled, list[Rollout]()
    assert own is not None
    longest = sorted(prompts, key=lambda x: -len(x.prompt_ids))[: config.prompts_per_step]
    size = own.max_completion_length
    for group, x in enumerate(longest):
        ids, zeros = np.resize(x.prompt_ids, size), np.zeros(size, np.float32)
        for sample in range(own.num_generations):
            values = {"values": zeros, "returns": zeros}
            one = Rollout(x.row, x.where, group, sample, x.prompt_ids, ids, "", True, zeros, {}, 0.0, zeros, values)
            found.append(one)
    return step_examples(config, found)


def pairs_of(rollouts: Sequence[Rollout], *, masked: bool = False) -> list[PreferenceExample]:
    """The completions of each prompt with the highest and the lowest reward, the first of equal ones.

    Left out are those without a reward and, if `masked`, without an end. If all are equal, nothing is preferred: the
    pair is one completion twice, whose gradient is 0.
    """
    groups: dict[int, list[Rollout]] = {}
    for x in rollouts:
        groups.setdefault(x.group, []).append(x)
    pairs = []
    for group in groups.values():
        known = [x for x in group if np.isfinite(x.reward) and (x.ended or not masked)] or group[:1]
        best, worst = max(known, key=lambda x: x.reward), min(known, key=lambda x: x.reward)
        ids = best.completion_ids, worst.completion_ids
        pairs.append(PreferenceExample(best.row, best.where, best.prompt_ids, *ids))
    return pairs


def facts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What is logged of a step's completions before the policy has scored them, by TRL's names."""
    groups: dict[int, list[float]] = {}
    for x in rollouts:
        groups.setdefault(x.group, []).append(x.reward)
    known = [[reward for reward in group if np.isfinite(reward)] for group in groups.values()]
    spreads = [float(np.std(group, ddof=1)) if len(group) > 1 else 0.0 for group in known if group]
    lengths, names = [len(x.completion_ids) for x in rollouts], rollouts[0].rewards
    parts = {f"rewards/{name}/mean": _mean([x.rewards[name] for x in rollouts]) for name in names}
    return {
        "reward": _mean([x.reward for x in rollouts]),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": _mean([float(spread == 0) for spread in spreads]),
        **(parts if len(parts) > 1 else {}),
        "rewards/failed": float(sum(not np.isfinite(x.reward) for x in rollouts)),
        "completions/mean_length": _mean(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([not x.ended for x in rollouts]),
    }


def _mean(values: Sequence[float]) -> float:
    """Without NaN; NaN of nothing."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


class KeptRollouts:
    """The rollouts of a run folder: `add` keeps those of a step until `flush` writes them; `read` finds them again.

    Of several ranks the first one writes; the others keep only the last step's.
    """

    def __init__(self, run_dir: Path, *, writes: bool = True) -> None:
        self.writes = writes
        self.folder = RunFolder(run_dir).rollouts
        self._waiting: dict[int, Sequence[Rollout]] = {}

    def add(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keep the completions that step `step`, counted from 1, sampled."""
        self._waiting = {**(self._waiting if self.writes else {}), step: rollouts}
        if sum(map(len, self._waiting.values())) > MOST:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one file."""
        if self._waiting and self.writes:
            lines = [_line(step, x) for step, rollouts in sorted(self._waiting.items()) for x in rollouts]
            write_table(self.folder, "rollouts", {name: [line[name] for line in lines] for name in lines[0]})
            self._waiting = {}

    def newest(self) -> list[Rollout]:
        """The completions of the last step that is written. Raises CheckpointError without any."""
        paths = sorted(self.folder.glob("rollouts-*.parquet"))
        return self.read(steps_of(paths[-1])[1] if paths else 0)

    def read(self, step: int) -> list[Rollout]:
        """The completions that step `step` sampled. Raises CheckpointError if they are not kept."""
        if step in self._waiting:
            return list(self._waiting[step])
        table = read_table(self.folder, "rollouts", step)
        if table is None or not len(table):
            raise CheckpointError(f"{self.folder} has no completions of step {step}: they are written at checkpoints")
        return [_rollout(line) for line in table.to_pylist()]


def _line(step: int, x: Rollout) -> dict[str, Any]:
    """A row of the table."""
    parts = {f"reward/{name}": value for name, value in x.rewards.items()}
    values = {f"values/{name}": value for name, value in x.values.items()}
    return {"step": step, **{name: getattr(x, name) for name in COLUMNS}, **parts, **values}


def _rollout(line: Mapping[str, Any]) -> Rollout:
    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}

    own: dict[str, Any] = {name: line[name] for name in COLUMNS}
    own |= {name: np.asarray(line[name], kind) for name, kind in ARRAYS.items()}
    values = {name: np.asarray(value, np.float32) for name, value in part("values/").items()}
    return Rollout(**own, rewards=part("reward/"), values=values)
