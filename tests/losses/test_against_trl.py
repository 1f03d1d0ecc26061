"""The losses that TRL 1.16 also has, against the code that its DPOTrainer runs, in float64.

`DPOTrainer._compute_loss` is called as it is, with a stand-in for the trainer and a model that answers with given
token log-probabilities. Left out on purpose, because TRL is wrong there: label smoothing with `sigmoid` (ignored),
`discopop` below x = -88 (NaN).
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlevel.losses import LOSSES, dpo_loss

dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")

WITHOUT_PEER = {"cdpo", "ipo_sum", "dpop", "rpo"}  # rpo: by way of TRL's list of losses, below
# TRL has some of these in other trainers, and the divergences in fp32 alone: tests/references works them out by hand
WITHOUT_PEER |= {"f_forward_kl", "f_js", "f_alpha", "ld_dpo", "odpo", "wpo", "simpo", "orpo", "cpo", "cpo_sum", "nll"}
LENGTHS = {"chosen": [4, 4, 7], "rejected": [5, 3, 6]}
LOGPS = {
    "chosen": [-10.0, -12.0, -9.25],
    "rejected": [-12.0, -10.0, -14.5],
    "ref_chosen": [-11.0, -11.5, -9.0],
    "ref_rejected": [-11.5, -11.0, -13.0],
}


def tensor(name: str) -> Tensor:
    return torch.tensor(LOGPS[name], dtype=torch.float64)


def trl_loss(loss_types: list[str], policy: Tensor, pairs: slice, label_smoothing: float) -> Tensor:
    """TRL's mean loss over pairs; policy (2P,) is chosen then rejected, spread evenly over each completion's tokens."""
    lengths = torch.tensor(LENGTHS["chosen"][pairs] + LENGTHS["rejected"][pairs])
    completion = (torch.arange(9)[None] >= 1) & (torch.arange(9)[None] <= lengths[:, None])  # one prompt token
    log_probs = completion[:, 1:] * (policy / lengths)[:, None]
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    class Model:
        training = True

        def __call__(self, **_: Any) -> SimpleNamespace:
            return outputs

    accelerator = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    metrics = {"train": {key: [] for key in METRICS}}
    trainer = SimpleNamespace(
        model=Model(), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=loss_types, loss_weights=[1.0] * len(loss_types), beta=0.1,
        label_smoothing=label_smoothing, args=SimpleNamespace(discopop_tau=0.05), use_weighting=False,
        _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(completion, dtype=torch.int64),
        "attention_mask": torch.ones_like(completion, dtype=torch.int64),
        "completion_mask": completion.long(),
        "ref_chosen_logps": tensor("ref_chosen")[pairs],
        "ref_rejected_logps": tensor("ref_rejected")[pairs],
    }
    loss: Tensor = dpo_trainer.DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)
    return loss


METRICS = [
    "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
]  # fmt: skip


def our_loss(loss_type: str, policy: Tensor, pairs: slice, label_smoothing: float) -> Tensor:
    chosen, rejected = policy.chunk(2)
    chosen_lengths, rejected_lengths = (torch.tensor(LENGTHS[key][pairs]) for key in ("chosen", "rejected"))
    return dpo_loss(
        chosen, rejected, tensor("ref_chosen")[pairs], tensor("ref_rejected")[pairs],
        loss_type=loss_type, label_smoothing=label_smoothing,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
    ).losses.mean()  # fmt: skip


def compare(ours: str, theirs: list[str], pairs: slice, label_smoothing: float, tolerance: float) -> None:
    policy = torch.cat([tensor("chosen")[pairs], tensor("rejected")[pairs]]).requires_grad_()
    results = []
    for loss in (our_loss(ours, policy, pairs, label_smoothing), trl_loss(theirs, policy, pairs, label_smoothing)):
        results.append((loss, *torch.autograd.grad(loss, policy)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITHOUT_PEER])
def test_value_and_gradient(name: str) -> None:
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].parameters else 0.0
    tolerance = 1e-7 if name == "exo_pair" else 1e-12  # TRL takes log(eps) of an fp32 tensor
    compare(name, [name], slice(0, 3), smoothing, tolerance)


def test_rpo_is_sigmoid_and_sft_a_pair_at_a_time() -> None:
    """TRL's `sft` averages over the tokens of the micro-batch, ours over each pair's: the same for one pair."""
    for pair in range(3):
        compare("rpo", ["sigmoid", "sft"], slice(pair, pair + 1), 0.0, 1e-12)
