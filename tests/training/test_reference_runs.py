"""Whole runs over a reference cache, by every logged number and the adapter's hash; no pass is made that it spares."""

import json
import signal
from pathlib import Path

import helpers
import pytest
import tomli_w
from reference_caching import alter, next_float, only, shards
from rich.console import Console
from safetensors.torch import load_file

from lowlevel.cli import main
from lowlevel.config.file import load_config
from lowlevel.errors import InterruptedRunError
from lowlevel.model.adapters import adapter_sha256
from lowlevel.running.assembly import check_inputs
from lowlevel.running.training import RunObserver, run_training

ROWS, STEPS_OF_RUN = 7, 8  # batch 2 x accumulation 1: 4 steps an epoch, 2 epochs


@pytest.fixture(scope="module")
def workspace(tiny_base, parent_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached runs")
    texts = [f"{'very ' * (i % 4)}short text number {i}" for i in range(ROWS + 2)]
    pairs = [{"prompt": t, "chosen": t[::-1], "rejected": "no " * (1 + i % 3)} for i, t in enumerate(texts)]
    return folder, tiny_base, parent_adapter, helpers.write_jsonl(folder / "dpo.jsonl", pairs)


def write_run(workspace, name, *, cache=None, order="shuffled", beta=0.1, **train) -> Path:
    folder, base, parent, rows = workspace
    tables = {
        "method": "dpo",
        "model": {"name": str(base), "adapter": str(parent)},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {"source": str(rows), "format": "preference", "max_length": 128,
                 "eval_source": "holdout", "eval_limit": 2},
        "dpo": {"beta": beta, "disable_dropout": False, **({"reference_cache": str(cache)} if cache else {})},
        "train": {"output_dir": str(folder / name), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                  "learning_rate": 5e-3, "num_train_epochs": 2, "logging_steps": 1, "data_order": order, **train},
    }  # fmt: skip
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def run(config: Path, **arguments) -> str:
    """What a run prints."""
    with open(config.with_suffix(".log"), "w") as file:
        run_training(load_config(config), Console(file=file, width=1000), **arguments)
    return config.with_suffix(".log").read_text()


def outcome(config: Path):
    """Every logged number but those of a clock, and the adapter's hash."""
    folder = config.with_suffix("")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]
    assert len(logged) == STEPS_OF_RUN + 2, "two evaluations"
    return logged, adapter_sha256(folder / "adapter")


@pytest.fixture(scope="module")
def live(workspace):
    """The runs without a cache, by (order, beta)."""
    found = {}
    for order, beta in (("shuffled", 0.1), ("shuffled", 0.3), ("sequential", 0.1)):
        config = write_run(workspace, f"live-{order}-{beta}", order=order, beta=beta)
        assert "reference cache" not in run(config)
        found[order, beta] = outcome(config)
    return found


EVALUATION = 2  # reference passes of the two evaluations, of one micro-batch each
AT_LOADING = 1  # and of the check of the LM head


def test_a_run_with_another_beta_makes_no_reference_pass(workspace, live, passes):
    cache = workspace[0] / "cache-beta"
    cold = write_run(workspace, "cold", cache=cache)
    printed = run(cold)
    assert f"reference cache: 0 micro-batches found, {STEPS_OF_RUN} computed ({cache})" in printed
    assert outcome(cold) == live["shuffled", 0.1]
    assert len(passes) == STEPS_OF_RUN + EVALUATION + AT_LOADING
    passes.clear()
    warm = write_run(workspace, "warm", cache=cache, beta=0.3)
    printed = run(warm)
    assert printed.count("reference cache") == 1
    assert f"reference cache: {STEPS_OF_RUN} micro-batches found, 0 computed ({cache})" in printed
    assert outcome(warm) == live["shuffled", 0.3] != live["shuffled", 0.1]
    assert len(passes) == 2 + EVALUATION + AT_LOADING, "two are verified, all others are spared"


def test_the_second_epoch_of_a_sequential_run_makes_none(workspace, live, passes):
    config = write_run(workspace, "sequential", cache=workspace[0] / "cache-sequential", order="sequential")
    printed = run(config)
    assert f"reference cache: {STEPS_OF_RUN // 2} micro-batches found, {STEPS_OF_RUN // 2} computed" in printed
    assert outcome(config) == live["sequential", 0.1]
    assert len(passes) == STEPS_OF_RUN // 2 + EVALUATION + AT_LOADING


@pytest.mark.parametrize("keep", [True, False])
def test_a_resumed_run_is_the_same_run(workspace, live, keep, monkeypatch):
    """With the cache that it began with, or with another one: the key may differ, since it changes nothing learned."""
    cache, stop = workspace[0] / f"cache-resumed-{keep}", 3
    config = write_run(workspace, f"resumed-{keep}", cache=cache)
    progress = RunObserver.progress

    def stopping(self, state, result):
        progress(self, state, result)
        if state.step == stop:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunObserver, "progress", stopping)
        with pytest.raises(InterruptedRunError):
            run(config)
    assert f"0 micro-batches found, {stop} computed" in config.with_suffix(".log").read_text()
    assert len(load_file(only(shards(cache)))) == stop, "written with the checkpoint"
    other = cache if keep else workspace[0] / "cache-other"
    printed = run(write_run(workspace, f"resumed-{keep}", cache=other), resume=True)
    assert f"resumed from step-{stop:08d}" in printed
    assert f"0 micro-batches found, {STEPS_OF_RUN - stop} computed" in printed
    assert outcome(config) == live["shuffled", 0.1]
    again = write_run(workspace, f"after-{keep}", cache=cache, beta=0.3)
    found = STEPS_OF_RUN if keep else stop
    assert f"{found} micro-batches found, {STEPS_OF_RUN - found} computed" in run(again)
    assert outcome(again) == live["shuffled", 0.3]


def test_a_run_over_an_altered_cache_says_so_and_is_the_live_run(workspace, live):
    cache = workspace[0] / "cache-altered"
    run(write_run(workspace, "to be altered", cache=cache))
    alter(only(shards(cache)), lambda key, value: next_float(value))
    config = write_run(workspace, "altered", cache=cache)
    printed = run(config)
    assert printed.count("reference cache: refused: ") == 1 and "continuing with the live pass" in printed
    assert ", then refused" in printed
    assert outcome(config) == live["shuffled", 0.1]


def test_a_folder_that_cannot_be_made_is_one_line_before_the_model_is_loaded(workspace, capsys, monkeypatch):
    taken = workspace[0] / "taken"
    taken.write_text("a file")
    config = write_run(workspace, "nowhere", cache=taken)
    monkeypatch.setattr("lowlevel.running.job.build_run_policy", pytest.fail)
    assert main(["dpo", str(config)]) == 2
    assert capsys.readouterr().err.strip() == f"error: dpo.reference_cache: {taken} cannot be created: File exists"
    assert not (config.with_suffix("") / "run-status.json").exists()
    check_inputs(load_config(write_run(workspace, "nowhere")))
