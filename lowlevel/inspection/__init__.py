"""The parts of a loss: each scored token of a step or a row, and the path from log-probabilities to the loss.

records = inspect_pairs(policy, method, examples)     # or inspect_sequences (sft), inspect_labelled (kto),
                                                      # inspect_rewards; `opening.inspect_run` for a run
records[0].chosen.contributions                       # (n,): beta * log-ratio of each token; together with the rejected
records[0].margin                                     # ones they sum to the margin
records[0].displacement                               # tokens that gained what the chosen completion lost, or None
"""

from lowlevel.inspection.displacement import Displacement, Distribution, TokenGain, displacement_of, largest_gains
from lowlevel.inspection.labelled import LabelledRecord, inspect_labelled
from lowlevel.inspection.records import (
    CompletionRecord,
    PairRecord,
    SequenceRecord,
    TokenRecord,
    inspect_pairs,
    inspect_sequences,
)
from lowlevel.inspection.rewards import RewardRecord, inspect_rewards

__all__ = [
    "CompletionRecord",
    "Displacement",
    "Distribution",
    "LabelledRecord",
    "PairRecord",
    "RewardRecord",
    "SequenceRecord",
    "TokenGain",
    "TokenRecord",
    "displacement_of",
    "inspect_labelled",
    "inspect_pairs",
    "inspect_rewards",
    "inspect_sequences",
    "largest_gains",
]
