"""The batches of an online method's step: prompts in the stateless order, completions, rewards, advantages.

The same weights, seed and step give the same completions, so a resumed run continues as if it had not stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from lowlevel.errors import EVAL_REWARD, CheckpointError, ConfigError
from lowlevel.hashing import key32
from lowlevel.heartbeat import working
from lowlevel.methods import DPO, Method, PolicyGradient
from lowlevel.model.policy import Policy
from lowlevel.online.rewards import Function, Rewards, exact_match
from lowlevel.online.rollouts import KeptRollouts, Rollout, facts, step_examples
from lowlevel.running.scoring import load_reward_run, rewards_of_replies
from lowlevel.sampling import Sampler, Sampling, build_sampler

SALT = 0x524F4C4C  # of the completions' random numbers
SHOWN = 3  # failures of reward functions that a step names


@dataclass
class OnlineSteps:
    """Samples and rewards the completions of each step when it is asked for, with the policy as it is then."""

    config: RunConfig
    policy: Policy
    method: PolicyGradient | DPO
    tokenizer: ChatTokenizer
    examples: Sequence[PromptExample]
    order: DataOrder
    sampler: Sampler
    rewards: Rewards
    kept: KeptRollouts
    note: Callable[[str], None]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        policy: Policy,
        method: PolicyGradient | DPO,
        inputs: Any,
        order: DataOrder,
        run_dir: Path,
        note: Callable[[str], None],
    ) -> OnlineSteps:
        """With the fastest sampler for the policy; loads reward runs. `inputs`: the run's `assembly.Inputs`."""
        assert config.sampled is not None
        tokenizer: ChatTokenizer = inputs.tokenizer
        rewards = Rewards.of(config.sampled, lambda folder: reward_run(folder, note))
        sampler = build_sampler(policy.model, policy.placement, tokenizer.stop_ids, note)
        kept = KeptRollouts(run_dir)
        return cls(config, policy, method, tokenizer, inputs.data.train, order, sampler, rewards, kept, note)

    def __call__(self, step: int) -> list[PackedBatch]:
        """The micro-batches of the step after `step` updates. Raises ConfigError if no completion has a reward."""
        assert self.config.sampled is not None
        first = step - step % self.config.sampled.num_iterations
        if step != first:
            return step_batches(self.config, self.method, self.kept.read(first + 1))
        started = time.perf_counter()
        prompts = [self.examples[i] for i in self.order.step_rows(step)]
        with working("sampling"):
            groups = self.sample(prompts, step)
        sampled = time.perf_counter()
        with working("rewarding"):
            scored = self.score(prompts, groups, f"step {step + 1}")
            rollouts = [x for group in scored for x in group]
            if not isinstance(self.method, DPO):
                rollouts = self.method.credit(self.policy, scored)
        self.kept.add(step + 1, rollouts)
        first_batch, *others = step_batches(self.config, self.method, rollouts)
        seconds = {"sampling_seconds": sampled - started, "rewarding_seconds": time.perf_counter() - sampled}
        return [replace(first_batch, facts={**first_batch.facts, **seconds}), *others]

    def sample(self, examples: Sequence[PromptExample], step: int, *, greedy: bool = False) -> list[list[Rollout]]:
        """A group of completions for each prompt, without rewards."""
        own = self.config.sampled
        assert own is not None
        size, seed = (1 if greedy else own.num_generations), self.config.train.seed
        keys = [[key32(seed, SALT, step, example.row, sample) for sample in range(size)] for example in examples]
        sampling = Sampling(own.max_completion_length, 0.0 if greedy else own.temperature, seed)
        prompts = [example.prompt_ids.tolist() for example in examples]
        found = self.sampler.sample(prompts, sampling, samples=size, keys=keys)
        return [
            [
                Rollout(
                    row=example.row,
                    where=example.where,
                    group=number,
                    sample=sample,
                    prompt_ids=example.prompt_ids,
                    completion_ids=one.ids.astype(np.int32),
                    text=self._text(one.ids, ended=one.ended),
                    ended=one.ended,
                    logps=one.logps,
                    rewards={},
                    reward=float("nan"),
                )
                for sample, one in enumerate(completions)
            ]
            for number, (example, completions) in enumerate(zip(examples, found, strict=True))
        ]

    def score(
        self, examples: Sequence[PromptExample], groups: Sequence[Sequence[Rollout]], when: str
    ) -> list[list[Rollout]]:
        """The same completions with their rewards; those without one are named. Raises ConfigError if none has one."""
        found, failures = list[list[Rollout]](), list[str]()
        for example, group in zip(examples, groups, strict=True):
            texts, ids = [x.text for x in group], [x.completion_ids.tolist() for x in group]
            scores = self.rewards(example, texts, ids)
            failures += scores.failures
            names, columns = list(self.rewards.functions), scores.by_function.T.tolist()
            totals = self.rewards.total(scores.by_function).tolist()
            found.append([
                replace(x, rewards=dict(zip(names, column, strict=True)), reward=total)
                for x, column, total in zip(group, columns, totals, strict=True)
            ])  # fmt: skip
        for line in failures[:SHOWN]:
            self.note(f"{when}: no reward: {line}")
        if len(failures) > SHOWN:
            self.note(f"{when}: and {len(failures) - SHOWN:,} more")
        if not any(np.isfinite(x.reward) for group in found for x in group):
            raise ConfigError(f"{when}: no completion has a reward: {failures[0]}")
        return found

    def evaluate(self, held_out: Sequence[PromptExample], step: int) -> dict[str, float]:
        """Mean reward, each function's part, and exact match of greedy completions of held-out prompts."""
        with working("sampling held-out prompts"):
            groups = self.sample(held_out, step, greedy=True)
        every = [x for group in self.score(held_out, groups, "held out") for x in group]
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

    def _text(self, ids: np.ndarray, *, ended: bool) -> str:
        return str(self.tokenizer.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))

    def __enter__(self) -> OnlineSteps:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with suppress(CheckpointError):  # of a failed run too, with the failing step
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
