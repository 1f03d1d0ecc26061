"""The sections of the methods that sample the completions they train on: [grpo], [rloo], [ppo], [online_dpo].

Keys that TRL has keep its names. There is no top_p and no top_k: the losses compare the policy with the policy that
sampled, and a truncated distribution is another policy (with top_p = 0.8 every ratio would start at 0.8).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lowlevel.config.section import Above, Finite, Names, NotNegative, Number, Numbers, Positive, Section

Share = Annotated[Finite, Field(ge=0, le=1)]
OWN_LOSS = 'your own by name or as "module:function"'


class SampledConfig(Section):
    """What every online method has: how completions are sampled and rewarded."""

    disable_dropout: ClassVar[bool] = True  # sampled and scored by the same policy
    pairs: ClassVar[bool] = False  # an example is made of two completions
    losses: ClassVar[tuple[str, ...]]  # the built-in ones

    loss_type: str
    loss_kwargs: dict[str, Number] = Field({}, description="hyper-parameters of your own loss")
    num_generations: Annotated[int, Field(ge=2, le=65_536)] = Field(8, description="completions of each prompt")
    max_completion_length: Positive = Field(128, description="most tokens of a completion")
    temperature: Above = Field(1.0, description="temperature of sampling, and of the log-probabilities in the loss")
    reward: Names = Field(
        ("exact_match",),
        description="reward functions: exact_match, gsm8k, format, length, a reward run's folder, module:function",
    )
    reward_weights: Numbers = Field((), description="weight of each function, between commas; default: 1")
    reward_pattern: str | None = Field(None, description="format: regular expression of a whole completion")
    reward_timeout: Above = Field(60.0, description="seconds that a function may take for one prompt's completions")
    mask_truncated_completions: bool = Field(
        False, description="leave completions that were cut at max_completion_length out of the loss"
    )
    num_iterations: Positive = Field(1, description="optimizer steps on the same completions")
    beta: NotNegative = Field(0.0, description="weight of the KL divergence from the reference; 0: no reference pass")

    @property
    def group(self) -> int:
        """Examples that one prompt gives."""
        return 1 if self.pairs else self.num_generations

    @property
    def line(self) -> str:
        """Reward and main settings, in words."""
        reward = f"reward {' + '.join(self.reward)}, {self.num_generations} completions a prompt"
        return f"{reward}, loss {self.loss_type}, beta {self.beta:g}"


class ClippedConfig(SampledConfig):
    """The clip range of the ratio between the policy and the one that sampled."""

    epsilon: Annotated[Finite, Field(gt=0, lt=1)] = Field(0.2, description="clip the ratio below 1 - epsilon")
    epsilon_high: Above | None = Field(
        None, description="clip it above 1 + epsilon_high (default epsilon, dapo 0.28; cispo: above epsilon_high, 5)"
    )


class GRPOConfig(ClippedConfig):
    """Group-relative policy optimisation (arXiv 2402.03300) and its family."""

    losses: ClassVar[tuple[str, ...]] = ("grpo", "dapo", "dr_grpo", "cispo", "sapo")

    loss_type: str = Field("dapo", description=f"grpo, dapo, dr_grpo, cispo or sapo (`lowlevel losses`); {OWN_LOSS}")
    delta: Annotated[Finite, Field(gt=1)] | None = Field(None, description="dual clip: upper bound of the ratio")
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="sequence: one ratio a completion, the geometric mean (GSPO, arXiv 2507.18071)"
    )
    scale_rewards: Literal["none", "group", "batch"] = Field("none", description="divide advantages by a deviation")
    kl_estimator: Literal["k2", "k3", "k3_ratio"] = Field(
        "k3_ratio", description="KL term; k2, k3_ratio: gradient of KL(pi || ref), k3 (TRL): of KL(ref || pi)"
    )


class RLOOConfig(ClippedConfig):
    """REINFORCE with the other completions' mean as baseline (arXiv 2402.14740); beta: KL (k1) in the reward."""

    losses: ClassVar[tuple[str, ...]] = ("rloo",)

    loss_type: str = Field("rloo", description=f"rloo; {OWN_LOSS}")


class PPOConfig(SampledConfig):
    """Proximal policy optimisation (arXiv 1707.06347) with a value head; beta: KL (k1) in the reward of each token."""

    losses: ClassVar[tuple[str, ...]] = ("ppo",)

    loss_type: str = Field("ppo", description=f"of the policy: ppo; {OWN_LOSS}")
    num_generations: Annotated[int, Field(ge=1, le=65_536)] = Field(1, description="completions of each prompt")
    cliprange: Annotated[Finite, Field(gt=0, lt=1)] = Field(0.2, description="clip the ratio to 1 +- cliprange")
    cliprange_value: Above = Field(0.2, description="clip the value to the old value +- cliprange_value")
    vf_coef: NotNegative = Field(0.1, description="weight of the value loss")
    gamma: Share = Field(1.0, description="discount")
    lam: Share = Field(0.95, description="lambda of generalised advantage estimation")
    whiten_advantages: bool = Field(True, description="mean 0 and deviation 1 over the tokens of a step")


class OnlineDPOConfig(SampledConfig):
    """DPO on the best and the worst of a prompt's completions by reward (arXiv 2402.04792)."""

    pairs: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = ("sigmoid", "ipo", "hinge")

    num_generations: Annotated[int, Field(ge=2, le=65_536)] = Field(2, description="completions of each prompt")
    beta: Above = Field(0.1, description="KL temperature, as in dpo")
    loss_type: str = Field("sigmoid", description=f"sigmoid, ipo or hinge, as in dpo; {OWN_LOSS}")
