"""How much of what SFT gained survives each way of merging its adapter? python benchmarks/merge.py RUN_DIR

RUN_DIR is a finished SFT run with held-out rows. Prints the held-out loss and the share of the gain that is kept, for
PEFT's `merge_and_unload` into the 4-bit model (what the well-known recipe starts DPO from) and for the three targets of
`lowlevel merge`.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from lowlevel.config.schema import ModelConfig
from lowlevel.model.attention_choice import MASKED, Attention
from lowlevel.model.base import load_base
from lowlevel.model.merging import merged_model
from lowlevel.reporting.comparison import load_held_out
from lowlevel.running.merge import vocabulary_logps
from lowlevel.running.reopening import LoadedRun, load_run


@torch.no_grad()
def held_out_loss(run: LoadedRun, model: Any, attention: Attention = MASKED) -> float:
    """Cross-entropy in nats a supervised token; `attention` is what the model was loaded with."""
    loss, tokens = 0.0, 0
    for row in load_held_out(run.folder.path)[0]:
        for batch in run.method.micro_batches([row]):
            logps, targets = vocabulary_logps(model, batch, run.policy.placement, attention)
            loss -= float(logps.gather(-1, targets.unsqueeze(-1)).sum())
            tokens += len(targets)
    return loss / tokens


def losses(run_dir: Path) -> dict[str, float]:
    """Held-out loss by way of merging."""
    run = load_run(run_dir)
    model, placement, attention = run.config.model, run.policy.placement, run.policy.attention
    found = {}
    for stage in run.stages:
        run.activate(stage)
        name = "base, no adapter" if stage.name == "base" else "adapter active"
        found[name] = held_out_loss(run, run.policy.causal_lm, attention)
    for name, quantised in (("original base, 16 bits", None), ("dequantized base, 16 bits", run.policy.model)):
        merged = merged_model(model, [run.folder.adapter], torch.float16, quantised=quantised)
        with tempfile.TemporaryDirectory() as folder:
            merged.save_pretrained(folder)
            plain = ModelConfig(name=folder, load_in_4bit=False)
            found[name] = held_out_loss(run, load_base(plain, placement).eval())
            if quantised is None:
                again = model.model_copy(update={"name": folder, "revision": None})
                found["original base, quantised again"] = held_out_loss(run, load_base(again, placement).eval())
    run.activate(run.stages[-1])
    peft_model: Any = run.policy.model
    merged = peft_model.merge_and_unload()
    found["merge_and_unload into the 4-bit model"] = held_out_loss(run, merged, attention)
    return found


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    found = losses(parser.parse_args().run_dir)
    before, gain = found["base, no adapter"], found["base, no adapter"] - found["adapter active"]
    writer = csv.writer(sys.stdout)
    writer.writerow(["merged into", "held_out_loss", "gain_kept"])
    for name, loss in found.items():
        writer.writerow([name, f"{loss:.4f}", f"{(before - loss) / gain:.1%}"])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
