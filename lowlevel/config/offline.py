"""The sections of the methods that train on rows as they are: [sft], [dpo], [kto], [reward]. Others: online.py."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from lowlevel.config.section import Above, Finite, NotNegative, Number, OptionalLocation, Positive, Section, as_sum


class SFTConfig(Section):
    """The loss of supervised fine-tuning."""

    disable_dropout: ClassVar[bool] = False
    loss_type: str = Field(
        "cross_entropy",
        description='cross_entropy, smoothed_cross_entropy or dft; your own by name or as "module:function"',
    )
    loss_kwargs: dict[str, Number] = Field({}, description="hyper-parameters of your own loss")
    label_smoothing: Annotated[Finite, Field(gt=0, lt=1)] | None = Field(
        None, description="smoothed_cross_entropy only: share of the target spread over the vocabulary (default 0.1)"
    )
    z_loss_weight: NotNegative = Field(0.0, description="adds z_loss_weight * logsumexp(logits)^2")


class DPOConfig(Section):
    """The preference loss (arXiv 2305.18290) and its hyper-parameters."""

    loss_type: Annotated[str, BeforeValidator(as_sum)] = Field(
        "sigmoid", description='see `lowlevel losses`; a sum ("0.8*sigmoid + 0.2*nll"); your own by "module:function"'
    )
    loss_kwargs: dict[str, Number] = Field({}, description="hyper-parameters of your own loss")
    beta: Above = Field(0.1, description="KL temperature: reward = beta * log-ratio; simpo: 2")
    label_smoothing: Annotated[Finite, Field(ge=0, lt=0.5)] = Field(0.0, description="assumed share of flipped labels")
    discopop_tau: Above | None = Field(None, description="discopop: temperature (0.05)")
    dpop_lambda: NotNegative | None = Field(None, description="dpop: penalty weight (50)")
    rpo_alpha: NotNegative | None = Field(None, description="rpo: NLL weight (1)")
    f_alpha: NotNegative | None = Field(None, description="f_alpha: the divergence's alpha, below 1 (0.5)")
    ld_alpha: NotNegative | None = Field(None, description="ld_dpo: weight of the longer completion's tail (0.5)")
    odpo_alpha: NotNegative | None = Field(None, description="odpo: weight of the rated margin (1)")
    simpo_gamma: NotNegative | None = Field(None, description="simpo: target margin (1)")
    orpo_lambda: NotNegative | None = Field(None, description="orpo: weight of the odds term (0.1)")
    cpo_alpha: NotNegative | None = Field(None, description="cpo, cpo_sum: NLL weight (1)")
    disable_dropout: bool = Field(True, description="policy pass without dropout, as in TRL and the original code")
    ref_model_sync_steps: Positive | None = Field(
        None, description="TR-DPO (arXiv 2404.09656): after every N steps the reference moves towards the policy"
    )
    ref_model_mixup_alpha: Annotated[Finite, Field(gt=0, le=1)] | None = Field(
        None, description="TR-DPO: share of the policy in the moved reference, 1: a copy of the policy; default 0.6"
    )
    reference_cache: OptionalLocation = Field(
        None, description="folder that keeps reference log-probabilities for reuse"
    )


class KTOConfig(Section):
    """KTO (arXiv 2402.01306): completions with a label, desirable or not."""

    beta: Above = Field(0.1, description="KL temperature: reward = beta * log-ratio")
    desirable_weight: NotNegative = Field(1.0, description="weight of desirable completions")
    undesirable_weight: NotNegative = Field(1.0, description="weight of undesirable completions")
    disable_dropout: bool = Field(True, description="policy pass without dropout")


class RewardConfig(Section):
    """A reward model: a scalar head, trained on pairs (Bradley-Terry, arXiv 2203.02155)."""

    center_rewards_coefficient: NotNegative = Field(
        0.0, description="weight of (r+ + r-)^2, which keeps rewards around 0 (arXiv 2312.09244); 0.01 is common"
    )
    disable_dropout: bool = Field(True, description="training pass without dropout, as in TRL")
