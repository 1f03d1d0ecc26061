"""The batches of an online method's step: prompts in the stateless order, completions, rewards, advantages.

The same weights, seed and step give the same completions, so a resumed run continues as if it had not stopped. Of
several ranks each samples and rewards the groups of every size-th prompt. What is drawn does not depend on the rank, so
completions are those of one rank unless rounding, which depends on the batch, decides between two tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.order import DataOrder
from lowlevel.config.schema import RunConfig
from lowlevel.data.examples import PromptExample
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.errors import EVAL_REWARD, ConfigError
from lowlevel.hashing import key32
from lowlevel.heartbeat import counted, working
from lowlevel.methods import Method, PolicyGradient
from lowlevel.model.policy import Policy
from lowlevel.online.rewards import Function, Rewards, exact_match
from lowlevel.online.rollouts import KeptRollouts, Rollout, facts, step_examples
from lowlevel.ranks import Ranks
from lowlevel.running.scoring import load_reward_run, rewards_of_replies
from lowlevel.sampling import Completion, Sampling, build_sampler

SALT = 0x524F4C4C  # of the completions' random numbers
SHOWN = 3  # failures of reward functions that a step names
Group = list[Rollout]  # the completions of a prompt


@dataclass
class OnlineSteps:
    """Samples and rewards the completions of each step when it is asked for, with the policy as it is then."""

    config: RunConfig
    policy: Policy
    method: Method
    tokenizer: ChatTokenizer
    examples: Sequence[PromptExample]
    order: DataOrder
    ranks: Ranks
    run_dir: Path
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        """Take the fastest sampler for the policy, and load reward runs."""
        assert self.config.sampled is not None
        self.sampled = self.config.sampled
        self.rewards = Rewards.of(self.sampled, lambda folder: reward_run(folder, self.note))
        self.sampler = build_sampler(self.policy.model, self.policy.placement, self.tokenizer.stop_ids, self.note)
        self.kept = KeptRollouts(self.run_dir, writes=self.ranks.first)

    def __call__(self, step: int) -> list[PackedBatch]:
        """The micro-batches of the step after `step` updates. Raises ConfigError if no completion has a reward."""
        first = step - step % self.sampled.num_iterations
        if step != first:
            return step_batches(self.config, self.method, self.kept.read(first + 1))
        started = time.perf_counter()
        prompts = [self.examples[i] for i in self.order.step_rows(step)]
        scored, sampling = self.groups(prompts, step, f"step {step + 1}")
        rollouts = [x for group in scored for x in group]
        if isinstance(self.method, PolicyGradient):
            rollouts = self.method.credit(self.policy, scored, self.ranks)
        self.kept.add(step + 1, rollouts)
        first_batch, *others = step_batches(self.config, self.method, rollouts)
        seconds = {"sampling_seconds": sampling, "rewarding_seconds": time.perf_counter() - started - sampling}
        return [replace(first_batch, facts={**first_batch.facts, **seconds}), *others]

    def groups(
        self, examples: Sequence[PromptExample], step: int, when: str, *, greedy: bool = False
    ) -> tuple[list[Group], float]:
        """A rewarded group of completions for each prompt, and the seconds of the rank that sampled longest.

        Those without a reward are named. Raises ConfigError if none has one.
        """
        found: list[tuple[Group, tuple[str, ...]]] = [([], ())] * len(examples)
        parts = self.ranks.collect(lambda: self._own(examples, step, greedy=greedy))
        for rank, (own, _) in enumerate(parts):
            found[rank :: self.ranks.size] = own
        failures = [line for _, lines in found for line in lines]
        for line in failures[:SHOWN]:
            self.note(f"{when}: no reward: {line}")
        if len(failures) > SHOWN:
            self.note(f"{when}: and {len(failures) - SHOWN:,} more")
        if not any(np.isfinite(x.reward) for group, _ in found for x in group):
            raise ConfigError(f"{when}: no completion has a reward: {failures[0]}")
        return [group for group, _ in found], max(seconds for _, seconds in parts)

    def _own(
        self, examples: Sequence[PromptExample], step: int, *, greedy: bool
    ) -> tuple[list[tuple[Group, tuple[str, ...]]], float]:
        """This rank's groups with their failures, and the seconds that sampling them took."""
        own, started = range(self.ranks.rank, len(examples), self.ranks.size), time.perf_counter()
        with working("sampling"):
            groups = self.sample({i: examples[i] for i in own}, step, greedy=greedy) if own else []
        seconds = time.perf_counter() - started
        pairs = [(examples[group[0].group], group) for group in groups]
        return [self.score(example, group) for example, group in counted("rewarding", pairs, "prompts")], seconds

    def sample(self, prompts: Mapping[int, PromptExample], step: int, *, greedy: bool = False) -> list[Group]:
        """A group of completions for each prompt, without rewards; `prompts` by their number in the step."""
        own, seed = self.sampled, self.config.train.seed
        size = 1 if greedy else own.num_generations
        keys = [[key32(seed, SALT, step, x.row, sample) for sample in range(size)] for x in prompts.values()]
        sampling = Sampling(own.max_completion_length, 0.0 if greedy else own.temperature, seed)
        ids = [x.prompt_ids.tolist() for x in prompts.values()]
        found = self.sampler.sample(ids, sampling, samples=size, keys=keys)
        return [
            [self._rollout(x, number, sample, one) for sample, one in enumerate(completions)]
            for (number, x), completions in zip(prompts.items(), found, strict=True)
        ]

    def _rollout(self, x: PromptExample, group: int, sample: int, one: Completion) -> Rollout:
        shown, ids = one.ids[:-1] if one.ended else one.ids, one.ids.astype(np.int32)
        text = str(self.tokenizer.tokenizer.decode(shown, skip_special_tokens=True))
        return Rollout(x.row, x.where, group, sample, x.prompt_ids, ids, text, one.ended, one.logps)

    def score(self, example: PromptExample, group: Sequence[Rollout]) -> tuple[Group, tuple[str, ...]]:
        """The completions of a prompt with their rewards, and a line for each failure."""
        texts, ids = [x.text for x in group], [x.completion_ids.tolist() for x in group]
        scores, names = self.rewards(example, texts, ids), list(self.rewards.functions)
        columns, totals = scores.by_function.T.tolist(), self.rewards.total(scores.by_function).tolist()
        scored = [
            replace(x, rewards=dict(zip(names, column, strict=True)), reward=total)
            for x, column, total in zip(group, columns, totals, strict=True)
        ]
        return scored, scores.failures

    def evaluate(self, held_out: Sequence[PromptExample], step: int) -> dict[str, float]:
        """Mean reward, each function's part, and exact match of greedy completions of held-out prompts."""
        groups, _ = self.groups(held_out, step, "held out", greedy=True)
        every = [x for group in groups for x in group]
        scores = {EVAL_REWARD: float(np.nanmean([x.reward for x in every]))}
        if len(self.rewards.functions) > 1:
            for name in self.rewards.functions:
                scores[f"eval_rewards/{name}/mean"] = float(np.nanmean([x.rewards[name] for x in every]))
        if all(example.reference is not None for example in held_out):
            matches = exact_match([x.text for x in every], [example.reference for example in held_out])
            scores["eval_exact_match"] = float(np.mean(matches))
        scores["eval_completions/mean_length"] = float(np.mean([len(x.completion_ids) for x in every]))
        scores["eval_completions/clipped_ratio"] = float(np.mean([not x.ended for x in every]))
        return scores

    def __enter__(self) -> OnlineSteps:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with suppress(OSError):  # of a failed run too, with the failing step
            self.kept.flush()


def step_batches(config: RunConfig, method: Method, rollouts: Sequence[Rollout]) -> list[PackedBatch]:
    """The micro-batches of a step; the first has the facts that are logged."""
    first, *others = method.micro_batches(step_examples(config, rollouts))
    return [replace(first, facts=facts(rollouts)), *others]


def reward_run(folder: Path, note: Callable[[str], None]) -> Function:
    """The reward model of a run folder as a reward function; it is loaded here."""
    run = load_reward_run(folder, note)

    def model(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        with torch.no_grad():
            return rewards_of_replies(run, prompts[0], completions)

    return model
