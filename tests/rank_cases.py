"""What test_ranks.py computes in one process, and in several."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import torch
from safetensors.torch import save_file

from lowlevel.errors import NonFiniteError
from lowlevel.execution import Eager
from lowlevel.loop import evaluate_examples
from lowlevel.optim.loss_scale import LossScale
from lowlevel.ranks import Ranks, joined
from lowlevel.running.endings import Interrupts

KINDS = {
    "sft": (helpers.sft, helpers.ragged_examples),
    "dpo": (partial(helpers.dpo, disable_dropout=False), partial(helpers.ragged_pairs, longest=8)),
    "kto": (partial(helpers.kto, disable_dropout=False), helpers.labelled_examples),
    "reward": (partial(helpers.reward, disable_dropout=False), helpers.ragged_pairs),
}
LAYOUTS = {f"{size}x{8 // size}": {"batch_size": size} for size in (8, 4, 2, 1)} | {
    "packed": {"batch_size": 1, "packing": True}
}


class Hurt:
    """An execution that goes wrong in one rank alone: an overflow above a loss scale, or a loss that is NaN."""

    def __init__(self, policy, method, here: bool, limit: float | None):
        self.policy, self.method, self.here, self.limit = policy, method, here, limit
        self.scale = LossScale()

    def run(self, batch, factor, key):
        sums = Eager(self.policy, self.method).run(batch, factor, key)
        if self.here and self.limit is None:
            return replace(sums, loss=sums.loss * float("nan"))
        if self.here and self.scale.scale > self.limit:
            self.policy.flat.grad[0] = float("inf")
        return sums


def compute(base: Path, ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Losses, gradients, weights and values by name; and messages."""
    found, said = {}, {}
    policies = {kind: helpers.make_policy(base, dropout=0.1, reward_head=kind == "reward") for kind in KINDS}
    for kind, (make, examples) in KINDS.items():
        for name, layout in LAYOUTS.items():
            result = helpers.step(policies[kind], make(**layout), examples(), ranks=ranks, details=name == "2x4")
            found[f"{kind} {name} metrics"] = torch.tensor(list(result.metrics.values()))
            found[f"{kind} {name} gradient"] = policies[kind].flat.grad.clone()
            if name == "2x4":
                found |= {f"{kind} {k} of examples": v.clone() for k, v in result.examples.items()}
                found |= {f"{kind} {k} of tokens": v.clone() for k, v in result.tokens.items()}
        batches = make(2).micro_batches(examples(7))
        scores = evaluate_examples(policies[kind], make(2), batches, prefix="eval_", ranks=ranks)
        found[f"{kind} evaluation"] = torch.tensor(list(scores.values()), dtype=torch.float64)
    policy, method, last = policies["sft"], helpers.sft(2), ranks.rank == ranks.size - 1
    hurt = Hurt(policy, method, last, 2.0**14)
    helpers.step(policy, method, helpers.ragged_examples(), ranks=ranks, execution=hurt, scale=hurt.scale)
    found["overflow gradient"] = policy.flat.grad.clone()
    found["overflow scale"] = torch.tensor([hurt.scale.scale, hurt.scale.skipped_steps])
    try:
        helpers.step(policy, method, helpers.ragged_examples(), ranks=ranks, execution=Hurt(policy, method, last, None))
    except NonFiniteError as error:
        said["nan"] = str(error)
    optimizer = torch.optim.AdamW([policy.flat.weights], lr=1e-3)
    for number in range(20):
        examples = helpers.ragged_examples(seed=number)
        helpers.step(policy, method, examples, optimizer, number=number, ranks=ranks, max_grad_norm=1.0)
    found["weights after 20 steps"] = policy.flat.weights.detach().clone()
    return found, said


def work(base: Path, out: Path) -> None:
    """Compute in one of several ranks."""
    with joined(30.0) as ranks, ranks.together(Interrupts(), lambda code, text: None):
        found, said = compute(base, ranks)
        ranks.check_equal(20, {"weights": [found["weights after 20 steps"]]})
        save_file(found, out / f"{ranks.size}-{ranks.rank}.safetensors")
        (out / f"{ranks.size}-{ranks.rank}.json").write_text(json.dumps(said))
