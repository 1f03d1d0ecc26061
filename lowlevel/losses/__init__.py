"""Pure loss functions: tensors in, per-token or per-pair tensors out; only torch and the standard library are imported.

Nothing here averages over a batch: the loop divides sums once by the count of the whole optimizer step, so that 1x8,
2x4 and 8x1 give the same gradient for ragged lengths.
"""

from lowlevel.losses.cross_entropy import masked_cross_entropy, sequence_logps
from lowlevel.losses.dpo import PairLogps
from lowlevel.losses.dpo_table import LOSSES, DPOOutput, PreferenceLoss, dpo_loss, loss_spec
from lowlevel.losses.kto import KTO_LOSSES, LabelledLogps
from lowlevel.losses.policy_gradient import POLICY_LOSSES, SampledLogps
from lowlevel.losses.registry import loss
from lowlevel.losses.reward import REWARD_LOSSES, PairRewards
from lowlevel.losses.sums import LossSums
from lowlevel.losses.supervised import SFT_LOSSES, SupervisedLoss, TokenLogps
from lowlevel.losses.token_logps import token_logps, token_logps_reference, token_scores, token_scores_reference

__all__ = [
    "POLICY_LOSSES", "KTO_LOSSES", "LOSSES", "REWARD_LOSSES", "SFT_LOSSES", "DPOOutput", "LabelledLogps", "LossSums",
    "PairLogps", "PairRewards", "PreferenceLoss", "SampledLogps", "SupervisedLoss", "TokenLogps", "dpo_loss", "loss",
    "loss_spec", "masked_cross_entropy", "sequence_logps", "token_logps", "token_logps_reference", "token_scores",
    "token_scores_reference",
]  # fmt: skip
