"""Every intermediate of one step as safetensors, with an index that describes each tensor.

DIR/index.json               description of each file and tensor, and the step's numbers
DIR/step.safetensors         weights before and after, their difference, gradients, optimizer state
DIR/micro-0.safetensors      a micro-batch: its tensors, hidden states, log-probabilities, losses
DIR/layers-0.safetensors     outputs of its decoder layers, if asked for
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.durable import new_folder, write_json
from lowlevel.execution import Eager, micro_step
from lowlevel.hashing import key32
from lowlevel.loop import with_baseline
from lowlevel.model.placement import dtype_name
from lowlevel.optim.optimizer import optimizer_tensors
from lowlevel.replaying.session import Session

Tensors = dict[str, Tensor]
MEANINGS = {
    "batch": "the micro-batch as it is laid out; lowlevel.batch.layout.PackedBatch describes each tensor",
    "policy.hidden": "(N, D) final hidden states at the scored positions",
    "policy.token_logps": "(N,) log-probability of each scored target; batch.sequence_ids = S marks dummy tokens, "
    "which are in no sum; of a reward model the reward at the last token of each completion",
    "policy.lse": "(N,) statistics of the vocabulary, where the loss reads them; likewise mean_logp, log_square_sum",
    "policy.logps": "(S,) token_logps summed by sequence: for pairs all chosen, then all rejected",
    "reference": "the same without the trained adapter and without dropout",
    "losses": "(P,) loss of each pair (dpo, reward), (S,) of each other example; their sum is the loss",
    "layer": "(rows, T, D) output of a decoder layer",
    "gradient": "of the step's mean loss, without loss scale and before clipping",
    "before": "adapter weights before the step",
    "after": "adapter weights after the step",
    "update": "after - before",
    "optimizer": "the optimizer's state over the flat buffer, before and after",
}


@dataclass
class Dump:
    """The tensors and numbers of a step."""

    step: int
    files: dict[str, Tensors] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write everything, or nothing. Raises ConfigError if the folder exists."""
        with new_folder(folder) as temporary:
            for name, tensors in self.files.items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / name)
            write_json(temporary / "index.json", self.index())

    def index(self) -> dict[str, Any]:
        """Description of each tensor."""
        described: dict[str, Any] = {}
        for file, tensors in self.files.items():
            described[file] = {k: {"shape": list(t.shape), "dtype": dtype_name(t.dtype)} for k, t in tensors.items()}
        return {"step": self.step, **self.numbers, "meanings": MEANINGS, "files": described}

    def add_update(self, session: Session) -> None:
        """Add weights, update and optimizer state after the step."""
        step = self.files["step.safetensors"]
        for name, view in session.policy.flat.views.items():
            after = _copy(view)
            step |= {f"after.{name}": after, f"update.{name}": after - step[f"before.{name}"]}
        step |= {f"optimizer.after.{name}": value for name, value in optimizer_tensors(session.optimizer).items()}


def observe(session: Session, *, layers: bool) -> Dump:
    """Forward and backward over the coming step's micro-batches, eagerly and under hooks; updates nothing."""
    policy, state, dump = session.policy, session.state, Dump(session.state.step + 1)
    batches = with_baseline(Eager(policy, session.method), session.batches(state.step))
    count, scale = sum(session.method.count(batch) for batch in batches), state.loss_scale.scale
    policy.layers.use(compiled=False)
    policy.flat.grad.zero_()
    described: list[dict[str, Any]] = []
    try:
        for number, batch in enumerate(batches):
            moved = batch.to(policy.placement.device)
            with _watched(session, layers) as seen:
                key = key32(session.config.train.seed, state.step)
                sums = micro_step(policy, session.method, moved, scale / count, key)
            named = {name: float(value) for name, value in sums.named().items()}
            described.append({"data_rows": list(batch.data_rows), "sums": named})
            losses = _copy(torch.where(moved.real, sums.examples["loss"], 0.0))
            dump.files[f"micro-{number}.safetensors"] = {**_micro_tensors(session, moved, seen), "losses": losses}
            if layers:
                dump.files[f"layers-{number}.safetensors"] = {k: v for k, v in seen.items() if k.startswith("layer.")}
        step = {f"gradient.{name}": _copy(grad) / scale for name, grad in policy.flat.named_grads().items()}
    finally:
        policy.flat.grad.zero_()
        policy.layers.use(compiled=session.compiled)
    step |= {f"before.{name}": _copy(view) for name, view in policy.flat.views.items()}
    step |= {f"optimizer.before.{name}": value for name, value in optimizer_tensors(session.optimizer).items()}
    dump.files["step.safetensors"] = step
    dump.numbers = {"method": session.method.name, "count": count, "loss_scale": scale, "micro_batches": described}
    return dump


@contextmanager
def _watched(session: Session, layers: bool) -> Iterator[Tensors]:
    """Outputs of the decoder, "hidden.policy" and "hidden.reference", and of its layers.

    Recomputing a layer in the backward pass happens inside its `forward`, where no hook is called: each hook sees one
    output per pass.
    """
    seen: Tensors = {}
    decoder: Any = session.policy.causal_lm.get_decoder()
    watched = [(decoder, "hidden")]
    if layers:
        watched += [(layer, f"layer.{number}") for number, layer in enumerate(session.policy.layers.layers)]

    def keep(name: str, module: object, arguments: object, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        seen[f"{name}.{'policy' if torch.is_grad_enabled() else 'reference'}"] = _copy(tensor)

    with ExitStack() as hooks:
        for module, name in watched:
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        yield seen


@torch.no_grad()
def _micro_tensors(session: Session, batch: PackedBatch, seen: Tensors) -> Tensors:
    tensors = {f"batch.{name}": _copy(tensor) for name, tensor in batch.tensors().items()}
    for name in ("policy", "reference"):
        if f"hidden.{name}" not in seen:
            continue
        decoded = seen[f"hidden.{name}"].to(batch.input_ids.device)
        hidden = decoded.flatten(0, 1).index_select(0, batch.scored_positions)
        needs = session.method.statistics if name == "policy" else ()
        logps, statistics = session.policy.scores(hidden, batch.scored_targets, needs)
        parts = {**statistics, "hidden": hidden, "token_logps": logps, "logps": batch.sequence_sums(logps)}
        tensors |= {f"{name}.{part}": _copy(value) for part, value in parts.items()}
    return tensors


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
