"""The result of a method's loss on a micro-batch: sums, which the loop divides once by the count of the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

LARGEST = "/max"  # ends the name of a metric that is the largest value and no sum
LABELS = ("desirable", "undesirable")


@dataclass(frozen=True)
class LossSums:
    """Sums over the `count` tokens or pairs of a micro-batch. Nothing here is a mean."""

    loss: Tensor  # scalar, differentiable until the backward pass
    metrics: Mapping[str, Tensor]  # scalars, detached, by the name they are logged under
    # Detached values of each example, (P,), and of each scored token, (N,); both include dummy examples.
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def over(
        cls, real: Tensor, losses: Tensor, metrics: Mapping[str, Tensor], examples: Mapping[str, Tensor],
        tokens: Mapping[str, Tensor | None],
    ) -> LossSums:  # fmt: skip
        """Losses and detached metrics of each example, (P,), summed over the `real` ones; a token value may be None."""
        return cls(
            torch.where(real, losses, 0.0).sum(),
            {name: torch.where(real, value, 0.0).sum() for name, value in metrics.items()},
            {"loss": losses.detach(), **examples},
            {name: value.detach() for name, value in tokens.items() if value is not None},
        )

    def named(self) -> dict[str, Tensor]:
        """Loss and metrics by name, detached scalars."""
        return {"loss": self.loss.detach(), **self.metrics}

    def flat(self) -> Tensor:
        """All values in one fp32 vector."""
        parts = [torch.stack(list(self.named().values())), *self.examples.values(), *self.tokens.values()]
        return torch.cat([part.float() for part in parts])

    def room(self, examples: int, tokens: int) -> int:
        """Length of `flat` for a micro-batch of so many examples and tokens with the same names."""
        return len(self.named()) + len(self.examples) * examples + len(self.tokens) * tokens

    def like_this(self, flat: Tensor, examples: int) -> LossSums:
        """The inverse of `flat` for a micro-batch of so many examples with the same names."""
        named, each, rest = flat.split(
            [count := len(self.named()), size := examples * len(self.examples), len(flat) - count - size]
        )
        loss, *metrics = named.unbind()
        parts = [dict(zip(names, part.chunk(max(1, len(names))), strict=False))
                 for names, part in ((self.examples, each), (self.tokens, rest))]  # fmt: skip
        return LossSums(loss, dict(zip(self.metrics, metrics, strict=True)), parts[0], parts[1])

    def kept(self, details: bool) -> LossSums:
        """With copies of `examples` and `tokens`, which a captured graph overwrites at its next replay, or without."""
        if not details:
            return replace(self, examples={}, tokens={})
        examples, tokens = ({k: v.clone() for k, v in part.items()} for part in (self.examples, self.tokens))
        return replace(self, examples=examples, tokens=tokens)


def by_label(means: Mapping[str, float]) -> dict[str, float]:
    """Means over a step where those of kto's labels ("rewards/desirable") become means over their own examples.

    "share/desirable" is the share of these examples in the step; without any, the label has no means. The difference
    of both rewards is "rewards/margins".
    """
    shares = {label: means.get(f"share/{label}", 1.0) for label in LABELS}

    def share(name: str) -> float:
        group, _, label = name.partition("/")
        return 1.0 if group == "share" else shares.get(label.removeprefix("ref_"), 1.0)

    found = {name: value / share(name) for name, value in means.items() if share(name)}
    rewards = [found[f"rewards/{label}"] for label in LABELS if f"rewards/{label}" in found]
    return found | ({"rewards/margins": rewards[0] - rewards[1]} if len(rewards) == 2 else {})
