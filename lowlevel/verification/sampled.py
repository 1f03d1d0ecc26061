"""The checks of a step on sampled completions (grpo, rloo, ppo): loss, gradient, layouts, and the kept advantages.

The loss is written out once more in float64, from the configuration and the kept completions alone; nothing of
`lowlevel.losses` takes part, except that a custom loss is its own formula: it is called for one completion at a time.
Log-probabilities come from the run's hidden states, and for the gradient from the whole model in float64. Of ppo the
value head is part of the loss check only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowlevel.config.online import ClippedConfig, GRPOConfig, PPOConfig
from lowlevel.losses import SampledLogps
from lowlevel.online.rollouts import Rollout
from lowlevel.verification.evidence import head_scores_of
from lowlevel.verification.exact import Scored, base_parameters, exact_model
from lowlevel.verification.formulas import in_float64
from lowlevel.verification.gradients import float64_checks
from lowlevel.verification.invariances import compare, layouts
from lowlevel.verification.subject import Check, Subject, check, largest, with_batches_of

Tensors = Sequence[Tensor]  # one of each completion


def sampled_checks(subject: Subject) -> list[Check]:
    """All checks of the step's completions. Dropout is off in these methods."""
    rollouts: Sequence[Rollout] = subject.examples
    policy, reference = head_scores_of(subject, rollouts)
    references = [one.exact[:, 0] for one in reference or policy]
    values = [_values(subject, x) for x in rollouts] if subject.method.name == "ppo" else None
    with torch.no_grad():
        logps = [one.exact[:, 0] for one in policy]
        expected = float(step_loss(subject.method, rollouts, logps, references, values))
    bound = subject.head_bound(max(one.largest_logit for one in [*policy, *(reference or [])]))
    error = max(largest(one.path - one.exact) for one in policy)
    tokens = sum(len(x.completion_ids) for x in rollouts)
    note = f"{tokens:,} tokens, nats, from the same hidden states"
    checks = [check("loss", "token log-probability", error, bound, note)]
    result, gradient = subject.run_step(with_batches_of(subject.method, len(rollouts)))
    steepest = max(1.0, *(float(abs(x.advantages).max(initial=0.0)) for x in rollouts))
    allowed = 20 * bound * steepest + 1e-6 * abs(expected)
    note = f"{expected:+.7f}, {subject.method.spec.name} in float64, divided by {result.count:,.10g}"
    checks.append(check("loss", "step loss", abs(result.metrics["loss"] - expected), allowed, note))
    checks += _advantages(subject, rollouts)
    for name, method in layouts(subject):  # the loss itself may be 0
        checks += compare(subject, name, subject.run_step(method), (result, gradient), least=1.0)
    if base_parameters(subject.policy) <= subject.exact_parameters and values is None:
        checks += _gradient(subject, rollouts, gradient, references)
    return checks


def step_loss(
    method: Any, rollouts: Sequence[Rollout], logps: Tensors, references: Tensors, values: Tensors | None = None
) -> Tensor:
    """The loss of a step, () float64, from the log-probabilities (n,) of each completion's tokens."""
    own, spec = method.config, method.spec
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    kind = spec.average if spec.own else spec.name
    for number, x in enumerate(rollouts):
        if not x.counted:
            continue
        new, ref = logps[number], references[number]
        losses = _by_function(method, x, new, ref) if spec.own else _token_losses(own, kind, x, new)
        if isinstance(own, GRPOConfig) and own.beta > 0 and "beta" not in spec.parameters:
            losses = losses + own.beta * _kl(own, x, new, ref)
        if values is not None:
            losses = losses + own.vf_coef * _value_losses(own, x, values[number])
        size = len(losses)
        total = total + (losses.mean() if kind in ("grpo", "sapo", "rloo", "sequences") else losses.sum())
        lengths = dict.fromkeys(("dapo", "cispo", "ppo", "tokens"), size)
        count += (lengths | dict.fromkeys(("dr_grpo", "constant"), own.max_completion_length)).get(kind, 1)
    return total / (count or 1.0)


def _by_function(method: Any, x: Rollout, new: Tensor, ref: Tensor) -> Tensor:
    """A custom loss of one completion alone, (n,). Raises ConfigError if it fails in float64."""
    old, advantages = (torch.from_numpy(part).double() for part in (x.logps, x.advantages))
    one, lengths = torch.arange(len(new)), torch.tensor([len(new)])
    reference = ref if method.has_reference else None
    given = SampledLogps(new, old, advantages, reference, torch.zeros_like(one), one[None], lengths)
    return in_float64(method.spec, given, method.settings)


def _token_losses(own: Any, kind: str, x: Rollout, new: Tensor) -> Tensor:
    """The losses of a completion's tokens, (n,)."""
    old, advantages = (torch.from_numpy(part).double() for part in (x.logps, x.advantages))
    logratios = new - old
    if kind == "rloo":
        logratios = logratios.sum().expand(len(new))
    elif isinstance(own, GRPOConfig) and own.importance_sampling_level == "sequence" and kind not in ("cispo", "sapo"):
        logratios = logratios.mean().expand(len(new))
    r = torch.exp(logratios)
    if kind == "cispo":
        high = 5.0 if own.epsilon_high is None else own.epsilon_high
        return -torch.where(r > high, high, r).detach() * advantages * new
    if kind == "sapo":
        given = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05} | own.loss_kwargs
        t = torch.where(advantages > 0, given["sapo_temperature_pos"], given["sapo_temperature_neg"]).double()
        return -4 / (t * (1 + torch.exp(-t * (r - 1)))) * advantages
    low, high = (own.cliprange,) * 2 if isinstance(own, PPOConfig) else _range(own)
    first = r * advantages
    if isinstance(own, GRPOConfig) and own.delta is not None:
        first = torch.where(r > own.delta, own.delta, r) * advantages
    inside = torch.where(r < 1 - low, 1 - low, torch.where(r > 1 + high, 1 + high, r)) * advantages
    return -torch.where(first < inside, first, inside)


def _range(own: ClippedConfig) -> tuple[float, float]:
    return own.epsilon, own.epsilon if own.epsilon_high is None else own.epsilon_high


def _kl(own: GRPOConfig, x: Rollout, new: Tensor, ref: Tensor) -> Tensor:
    if own.kl_estimator == "k2":
        return 0.5 * (new - ref) ** 2
    k3 = torch.exp(ref - new) - (ref - new) - 1
    return k3 * torch.exp(new - torch.from_numpy(x.logps).double()) if own.kl_estimator == "k3_ratio" else k3


def _value_losses(own: PPOConfig, x: Rollout, values: Tensor) -> Tensor:
    old, returns = (torch.from_numpy(x.values[name]).double() for name in ("values", "returns"))
    near = torch.minimum(torch.maximum(values, old - own.cliprange_value), old + own.cliprange_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


@torch.no_grad()
def _values(subject: Subject, x: Rollout) -> Tensor:
    """What the value head gives before each token of a completion, (n,) float64, from the run's hidden states."""
    (batch,) = subject.batches(with_batches_of(subject.method, 1), [x])
    assert subject.policy.value_head is not None
    subject.policy.dropout.disable()
    return (subject.policy.scored_hidden_states(batch).double() @ subject.policy.value_head.double()[0]).cpu()


def _advantages(subject: Subject, rollouts: Sequence[Rollout]) -> list[Check]:
    """Advantages of grpo without a deviation and of rloo without KL, from the kept rewards by their definition."""
    own: Any = subject.config.own
    plain = isinstance(own, GRPOConfig) and own.scale_rewards == "none"
    if not plain and not (subject.method.name == "rloo" and own.beta == 0):
        return []
    worst = 0.0
    for x in rollouts:
        rewards = [other.reward for other in rollouts if other.group == x.group and other.reward == other.reward]
        if not x.counted:
            continue
        others = len(rewards) - (subject.method.name == "rloo")
        base = sum(rewards) - (x.reward if subject.method.name == "rloo" else 0.0)
        worst = max(worst, float(abs(x.advantages - (x.reward - base / max(others, 1))).max()))
    name, groups = "advantages of the kept rewards", len({x.group for x in rollouts})
    return [check("loss", name, worst, 1e-6, f"prompts: {groups}, completions: {len(rollouts)}")]


def _gradient(subject: Subject, rollouts: Sequence[Rollout], gradient: Tensor, references: Tensors) -> list[Check]:
    """The step's flat gradient against float64 autograd through the whole model, and central differences."""
    if subject.temperature != 1:
        return []  # the float64 model has the logits of temperature 1
    model = exact_model(subject.policy, subject.config.model)
    sequences = [[Scored(x.input_ids, torch.arange(len(x.prompt_ids), len(x.input_ids)).numpy())] for x in rollouts]

    def loss(flat: Tensor) -> Tensor:
        logps = [scores[0][:, 0] for scores in model.examples(flat, sequences)]
        return step_loss(subject.method, rollouts, logps, references)

    return float64_checks(subject, loss, gradient, f"completions: {len(rollouts)}")
