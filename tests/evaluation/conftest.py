"""A short SFT run and a DPO run on it, both on the demo's base without quantisation, and local tasks."""

import sys
from pathlib import Path

import pytest
import workspace

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # benchmarks are no installed package

SHORT = ("--model.name", "demo", "--model.load_in_4bit", "false", "--lora.r", "8", "--data.source", "demo",
         "--data.max_length", "128", "--data.limit", "32", "--train.learning_rate", "3e-3", "--train.max_steps", "2",
         "--train.per_device_train_batch_size", "8", "--train.gradient_accumulation_steps", "1")  # fmt: skip


@pytest.fixture(scope="session")
def dpo_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    for method, more in (("sft", ()), ("dpo", ("--model.adapter", folder / "sft"))):
        said = workspace.run(method, *SHORT, *more, "--train.output_dir", folder / method)
        assert said.code == 0, said.err
    return folder / "dpo"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> dict[str, str]:
    pytest.importorskip("lm_eval", reason="no lm-eval here: pip install lowlevel[eval]")
    from benchmarks.world_tasks import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"))
