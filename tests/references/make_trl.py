"""Writes `trl.json`: what TRL itself computes at the points of `losses.json`, for the losses that it has.

`DPOTrainer._compute_loss` is run as in `tests/losses/test_against_trl.py`, whose driver is used here; no number comes
from the project's losses. Needs TRL (the dev extra). Run it to write the file anew::

    python tests/references/make_trl.py
"""

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from reference_file import as_text

HERE = Path(__file__).parent
PATH = HERE / "trl.json"
BETA = 0.1  # the driver's
# our name: TRL's loss types, label_smoothing. rpo: one pair a call, since TRL's sft averages over a batch's tokens
LOSSES: dict[str, tuple[list[str], float]] = {
    "sigmoid": (["sigmoid"], 0.0),
    "robust": (["robust"], 0.1),
    "hinge": (["hinge"], 0.0),
    "ipo": (["ipo"], 0.0),
    "exo_pair": (["exo_pair"], 0.001),
    "nca_pair": (["nca_pair"], 0.0),
    "bco_pair": (["bco_pair"], 0.0),
    "sppo_hard": (["sppo_hard"], 0.0),
    "aot": (["aot"], 0.1),
    "aot_unpaired": (["aot_unpaired"], 0.1),
    "apo_zero": (["apo_zero"], 0.0),
    "apo_down": (["apo_down"], 0.0),
    "discopop": (["discopop"], 0.0),
    "sigmoid_norm": (["sigmoid_norm"], 0.0),
    "rpo": (["sigmoid", "sft"], 0.0),
}
OTHER = {"discopop": {"discopop_tau": 0.05}, "rpo": {"rpo_alpha": 1.0}}  # as the driver and TRL's weights have them


def driver() -> Any:
    """The test file that knows how to call TRL, as a module of its own."""
    path = HERE.parent / "losses" / "test_against_trl.py"
    spec = importlib.util.spec_from_file_location("trl_driver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> list[dict[str, Any]]:
    """Every loss that TRL has at Z, P, R and B."""
    trl = driver()
    how = f"TRL {version('trl')}, DPOTrainer._compute_loss, float64 on a CPU, torch {version('torch').split('+')[0]}"
    points = json.loads((HERE / "losses.json").read_text(encoding="utf-8"))["points"]
    rows = []
    for point_name in ("Z", "P", "R", "B"):
        point = points[point_name]
        trl.LOGPS = {key: point[key] for key in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
        trl.LENGTHS = {"chosen": point["n"], "rejected": point["m"]}
        pairs = len(point["chosen"])
        for name, (types, smoothing) in LOSSES.items():
            if name == "rpo" and pairs > 1:
                continue
            policy = torch.tensor(point["chosen"] + point["rejected"], dtype=torch.float64, requires_grad=True)
            loss = trl.trl_loss(types, policy, slice(0, pairs), smoothing)
            chosen, rejected = torch.autograd.grad(loss, policy)[0].chunk(2)
            parameters = {"beta": BETA, **({"label_smoothing": smoothing} if smoothing else {}), **OTHER.get(name, {})}
            rows.append(
                {
                    "loss": name,
                    "point": point_name,
                    "parameters": parameters,
                    "trl_loss_type": types,
                    "mean_loss": loss.item(),
                    "grad_chosen_logps": [value + 0.0 for value in chosen.tolist()],
                    "grad_rejected_logps": [value + 0.0 for value in rejected.tolist()],
                    "how": how,
                }
            )
    return rows


FORMAT = {
    "version": 1,
    "about": "Preference losses as TRL computes them. Absent: what TRL lacks (cdpo, ipo_sum, dpop) and what it gets "
    "wrong (label smoothing with sigmoid is ignored; discopop is NaN below a margin of -88).",
    "cases[].loss, point, parameters": "as in losses.json, which holds the inputs",
    "cases[].trl_loss_type": "the loss_type that TRL was given (several: their sum)",
    "cases[].mean_loss": "mean over the point's pairs",
    "cases[].grad_*_logps": "derivative of the mean in each pair's policy log-probability",
    "cases[].how": "which TRL, and how it was run",
    "tolerance": "1e-12 relative and absolute; exo_pair 1e-7, since TRL takes the logarithm of an fp32 label_smoothing",
}


def text() -> str:
    """The file as text, one case a line."""
    return as_text(format=FORMAT, cases=cases())


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
