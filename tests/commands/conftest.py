"""A tiny base, and one SFT and one DPO run through the command line, made once for all tests of this folder."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # benchmarks are no installed package

from plain_models import held_out_logps, plain_base, plain_stack  # noqa: E402
from workspace import HELD_OUT, Runs, Workspace, make_workspace, run  # noqa: E402


@pytest.fixture(scope="session")
def cli():
    return run


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("commands")
    return make_workspace(folder)


@pytest.fixture(scope="session")
def runs(space) -> Runs:
    held_out = {"eval_source": "holdout", "eval_limit": HELD_OUT}
    train = {"logging_steps": 2, "eval_steps": 3, "save_steps": 3}
    files = {
        "sft": space.write("sft", "sft", data=held_out, train=train),
        "dpo": space.write("dpo", "dpo", data=held_out, train=train, model={"adapter": str(space.folder / "sft")}),
    }
    said = {method: run(method, path) for method, path in files.items()}
    for result in said.values():
        assert result.code == 0, result.err
    return Runs(space, space.folder / "sft", space.folder / "dpo", said)


@pytest.fixture(scope="session")
def tokenizer(space):
    return AutoTokenizer.from_pretrained(space.base)


@pytest.fixture(scope="session")
def stages(runs, tokenizer) -> dict[str, dict[str, torch.Tensor]]:
    """Held-out log-probabilities of base, SFT and DPO, by plain PEFT."""
    model = plain_stack(plain_base(runs.space.base), runs.dpo / "parent", runs.dpo / "adapter")
    with model.disable_adapter():
        scores = {"base": held_out_logps(model, tokenizer)}
    model.base_model.set_adapter(["parent", "dpo"])
    scores["dpo"] = held_out_logps(model, tokenizer)
    model.base_model.set_adapter("parent")
    return {**scores, "sft": held_out_logps(model, tokenizer)}


@pytest.fixture(scope="session")
def merged(runs) -> Path:
    """The DPO run, merged into the dequantised base."""
    out = runs.space.folder / "merged"
    result = run("merge", runs.dpo, "--out", out)
    assert result.code == 0, result.err
    return out
