"""What test_ranks.py computes in one process, and in several."""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import torch
from online.rollouts_by_hand import groups_of, rollouts
from pytest import MonkeyPatch
from safetensors.torch import save_file
from transformers import core_model_loading

from lowlevel.config.online import GRPOConfig, PPOConfig
from lowlevel.errors import NonFiniteError
from lowlevel.execution import Eager
from lowlevel.loop import evaluate_examples
from lowlevel.methods import GRPO, PPO
from lowlevel.model import sharding
from lowlevel.model.base import base_sha256
from lowlevel.model.dequantised import quantised_weights
from lowlevel.model.policy import is_base
from lowlevel.optim.loss_scale import LossScale
from lowlevel.ranks import Ranks, here, joined
from lowlevel.running.endings import Interrupts
from lowlevel.verification.exact import base_parameters


def grpo(batch_size=8, packing=False):
    return GRPO(GRPOConfig(max_completion_length=16, beta=0.1), batch_size, 64, packing)


def ppo(batch_size=8, packing=False):
    """A step's values and its KL are shared out too."""
    return PPO(PPOConfig(max_completion_length=16, beta=0.1), batch_size, 64, packing)


KINDS = {
    "sft": (helpers.sft, helpers.ragged_examples),
    "dpo": (partial(helpers.dpo, disable_dropout=False), partial(helpers.ragged_pairs, longest=8)),
    "kto": (partial(helpers.kto, disable_dropout=False), helpers.labelled_examples),
    "reward": (partial(helpers.reward, disable_dropout=False), helpers.ragged_pairs),
    "grpo": (grpo, partial(rollouts, prompts=2)),
    "ppo": (ppo, partial(rollouts, prompts=2)),
}
SAMPLED = ("grpo", "ppo")
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


def compute(base: Path, stored: Path, ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Losses, gradients, weights and values by name; and messages. `stored`: the base, quantised in its files."""
    found, said = {}, {}
    heads = {"reward": {"reward_head": True}, "ppo": {"value_head": True}}
    policies = {kind: helpers.make_policy(base, dropout=0.1, **heads.get(kind, {})) for kind in KINDS}
    with torch.no_grad():
        policies["ppo"].value_head.normal_(generator=torch.Generator().manual_seed(0))
    for kind, (make, examples) in KINDS.items():
        for name, layout in LAYOUTS.items():
            given, method = examples(), make(**layout)
            if kind in SAMPLED:
                given = method.credit(policies[kind], groups_of(given), ranks)
                found[f"{kind} {name} advantages"] = torch.cat([torch.from_numpy(x.advantages) for x in given])
            result = helpers.step(policies[kind], method, given, ranks=ranks, details=name == "2x4")
            found[f"{kind} {name} metrics"] = torch.tensor(list(result.metrics.values()))
            found[f"{kind} {name} gradient"] = policies[kind].flat.grad.clone()
            if name == "2x4":
                found |= {f"{kind} {k} of examples": v.clone() for k, v in result.examples.items()}
                found |= {f"{kind} {k} of tokens": v.clone() for k, v in result.tokens.items()}
        if kind in SAMPLED:
            continue
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
    for kind in ("plain", "4-bit", "stored"):
        sharded(stored if kind == "stored" else base, kind, ranks, found, said)
    return found, said


def sharded(base: Path, kind: str, ranks: Ranks, found: dict[str, torch.Tensor], said: dict[str, str]) -> None:
    """Steps of 8 and of 3 micro-batches over a base that several ranks share; adds to what is found and said."""
    quantised = kind != "plain"
    more = {"dropout": 0.1, "checkpointing": True, "recomputed": 1, "offload": quantised}
    with MonkeyPatch.context() as patch:
        whole = watch_loading(patch) if ranks.size > 1 else []
        policy = helpers.make_policy(base, quantised=quantised, shards=ranks if ranks.size > 1 else None, **more)
        said[f"{kind} layers whole at once"] = str(max(whole, default=0))
    layers = [parameter for name, parameter in policy.model.named_parameters() if ".layers." in name and is_base(name)]
    found[f"{kind} bytes of layers"] = torch.tensor(sum(here(parameter).nbytes for parameter in layers))
    said[f"{kind} sha256"], weights = base_sha256(policy.model), quantised_weights(policy)
    said[f"{kind} weights"] = f"{weights} {base_parameters(policy)}"
    for method, count in itertools.product(("sft", "dpo"), (8, 3)) if kind != "stored" else [("sft", 3)]:
        make, examples = KINDS[method]
        result = helpers.step(policy, make(1), examples(count), ranks=ranks, details=True)
        name = f"sharded {method} {kind} {count}"
        found[f"{name} metrics"] = torch.tensor(list(result.metrics.values()))
        found[f"{name} gradient"] = policy.flat.grad.clone()
        found |= {f"{name} {k} of examples": value.clone() for k, value in result.examples.items()}
        scores = evaluate_examples(policy, make(1), make(1).micro_batches(examples(count)), prefix="", ranks=ranks)
        found[f"{name} evaluation"] = torch.tensor(list(scores.values()), dtype=torch.float64)


def watch_loading(patch: MonkeyPatch) -> list[int]:
    """The number of layers with weights that are not yet sharded, each time that a weight has been loaded."""
    load, shard = core_model_loading.set_param_for_module, sharding.shard_layer
    begun, done, whole = set(), [], []

    def loaded(model, name, *rest):
        load(model, name, *rest)
        begun.update(name.split(".")[2:3] if ".layers." in name else ())
        whole.append(len(begun) - len(done))

    patch.setattr(core_model_loading, "set_param_for_module", loaded)
    patch.setattr(sharding, "shard_layer", lambda *arguments: done.append(shard(*arguments)))
    return whole


def work(base: Path, stored: Path, out: Path) -> None:
    """Compute in one of several ranks."""
    with joined({"30 s": 30.0}) as ranks, ranks.together(Interrupts(), lambda code, text: None):
        found, said = compute(base, stored, ranks)
        ranks.check_equal(20, {"weights": [found["weights after 20 steps"]]})
        save_file(found, out / f"{ranks.size}-{ranks.rank}.safetensors")
        (out / f"{ranks.size}-{ranks.rank}.json").write_text(json.dumps(said))
