"""A trace holds the numbers that the step computed, costs nothing when off, and survives a stop."""

import json
import math
import os
import signal
from collections import defaultdict
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from rich.console import Console
from workspace import metrics, run

from lowlevel.checkpoints.tables import drop_after, read_table
from lowlevel.config.file import config_from_tables, load_config
from lowlevel.errors import InterruptedRunError, NonFiniteError
from lowlevel.execution import Eager
from lowlevel.losses import PreferenceLoss
from lowlevel.optim.loss_scale import LossScale
from lowlevel.running.plots import panels
from lowlevel.running.run_folder import RunFolder
from lowlevel.running.training import RunObserver, run_training
from lowlevel.tracing import Tracer

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
PREFERENCE = {"method": "dpo", "data": {"format": "preference"}}


def tracer(policy, method, folder, **trace) -> Tracer:
    tables = PREFERENCE if method.name == "dpo" else {}
    return Tracer(config_from_tables({**tables, "trace": {"every": 1, **trace}}, "x"), policy, method, folder)


def traced_step(policy, method, examples, folder, *, optimizer=None, scale=None, step=0, **trace):
    """One step with a tracer: (result, rows, line of the steps table)."""
    from lowlevel.loop import optimizer_step

    keeper = tracer(policy, method, folder, **trace)
    optimizer = optimizer or torch.optim.SGD([policy.flat.weights], lr=0.0)
    result = optimizer_step(
        Eager(policy, method), optimizer, method.micro_batches(examples), scale or LossScale.for_precision("fp32"),
        seed=1, step=step, max_grad_norm=float("inf"), tracer=keeper,
    )  # fmt: skip
    keeper.flush()
    kind = "pairs" if method.name == "dpo" else "examples"
    return result, read_table(folder, kind).to_pylist(), read_table(folder, "steps").to_pylist()[-1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_pair_has_the_numbers_of_its_step(space, tmp_path, packing):
    policy = helpers.make_policy(space.base)
    method = helpers.dpo(3, packing=packing, beta=0.3)
    pairs = helpers.ragged_pairs(8)
    result, rows, line = traced_step(policy, method, pairs, tmp_path / "trace", level="token")
    assert sorted(row["row"] for row in rows) == [pair.row for pair in pairs]
    by_row = {pair.row: pair for pair in pairs}
    for row in rows:
        pair = by_row[row["row"]]
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            assert row[f"{side}_token_ids"] == ids.tolist() and row[f"{side}_length"] == len(ids)
            assert math.fsum(row[f"{side}_token_logps"]) == pytest.approx(row[f"{side}_logps"], abs=1e-4)
            assert math.fsum(row[f"{side}_ref_token_logps"]) == pytest.approx(row[f"ref_{side}_logps"], abs=1e-4)
            ratio = row[f"{side}_logps"] - row[f"ref_{side}_logps"]
            assert row[f"{side}_logratio"] == pytest.approx(ratio, abs=1e-5)
            assert row[f"{side}_reward"] == pytest.approx(0.3 * ratio, abs=1e-5)
        margin = row["margin"]
        assert margin == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)
        assert row["weight"] == pytest.approx(1 / (1 + math.exp(margin)), abs=1e-6) == row["rejected_weight"]
        assert row["loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-6)
    logged = {"rewards/margins": "margin", "logps/chosen": "chosen_logps", "loss": "loss"}
    for name, column in logged.items():
        assert np.mean([row[column] for row in rows]) == pytest.approx(result.metrics[name], rel=1e-5)
    assert (line["step"], line["pairs"], line["loss_scale"]) == (1, 8, 1.0)
    assert len({row["micro_batch"] for row in rows}) > (not packing)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust"])
def test_the_weights_are_the_slopes_that_the_step_used(space, tmp_path, monkeypatch, loss_type):
    config = {"loss_type": loss_type, "beta": 0.2} | ({"label_smoothing": 0.1} if loss_type == "robust" else {})
    policy, seen, original = helpers.make_policy(space.base), [], PreferenceLoss.__call__

    def watched(self, pairs):
        for tensor in (pairs.chosen_logps, pairs.rejected_logps):
            tensor.register_hook(lambda grad: seen.append(grad.clone()))
        return original(self, pairs)

    monkeypatch.setattr(PreferenceLoss, "__call__", watched)
    _, rows, _ = traced_step(policy, helpers.dpo(8, **config), helpers.ragged_pairs(8), tmp_path / "trace")
    slopes = sorted(seen[:2], key=lambda grad: grad.sum())  # of the step; the chosen one's is below zero
    for column, sign, slope in (("weight", -1, slopes[0]), ("rejected_weight", 1, slopes[1])):
        expected = sign * slope * 8 / 0.2  # the step divides by the pairs
        assert torch.allclose(torch.tensor([row[column] for row in rows]), expected, rtol=1e-5, atol=1e-7)


def test_an_sft_example(space, tmp_path):
    policy = helpers.make_policy(space.base, dropout=0.3)
    examples = helpers.ragged_examples(7)
    result, rows, line = traced_step(policy, helpers.sft(3), examples, tmp_path / "trace", level="token")
    by_row = {example.row: example for example in examples}
    for row in rows:
        labels = by_row[row["row"]].labels
        assert row["token_ids"] == labels[labels != -100].tolist() and row["length"] == len(row["token_ids"])
        assert math.fsum(row["token_logps"]) == pytest.approx(row["logps"], abs=1e-4)
    assert sum(row["loss"] for row in rows) / line["tokens"] == pytest.approx(result.metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("disable_dropout", [True, False])
def test_the_gradients_terms_add_up_and_the_step_keeps_its_gradient(space, tmp_path, disable_dropout):
    method, pairs = helpers.dpo(3, beta=0.3, disable_dropout=disable_dropout), helpers.ragged_pairs(8)
    policy = helpers.make_policy(space.base, dropout=0.3)
    _, plain = helpers.loss_and_gradient(policy, method, pairs)
    _, rows, line = traced_step(policy, method, pairs, tmp_path / "trace", gradients=True)
    assert torch.equal(policy.flat.grad, plain)
    terms = {side: term_of(policy, method, pairs, side) for side in ("chosen", "rejected")}
    assert torch.allclose(terms["chosen"] + terms["rejected"], plain, atol=1e-5)
    for side, term in terms.items():
        assert line[f"{side}_grad_norm"] == pytest.approx(term.norm().item(), rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(terms["chosen"], terms["rejected"], dim=0).item()
    assert line["grad_cosine"] == pytest.approx(cosine, abs=1e-3)
    assert line["grad_norm"] == pytest.approx(plain.norm().item(), rel=1e-5)
    policy.flat.grad.copy_(plain)
    squares = defaultdict(float)
    for name, grad in policy.flat.named_grads().items():
        squares[int(name.split(".layers.")[1].split(".")[0])] += grad.norm().item() ** 2
        squares[name.split(".lora_")[0].split(".")[-1]] += grad.norm().item() ** 2
    assert line["layer_norms"] == pytest.approx([squares[0] ** 0.5, squares[1] ** 0.5], rel=1e-4)
    assert line["down_proj_grad_norm"] == pytest.approx(squares["down_proj"] ** 0.5, rel=1e-4)
    assert line["zero_share"] == pytest.approx((plain == 0).float().mean().item(), abs=1e-6)


def term_of(policy, method, pairs, side) -> torch.Tensor:
    """The gradient with the other completion's log-probabilities held fixed: the loss sees them detached."""
    original, fixed = PreferenceLoss.__call__, "rejected_logps" if side == "chosen" else "chosen_logps"

    def one_sided(self, given):
        return original(self, replace(given, **{fixed: getattr(given, fixed).detach()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreferenceLoss, "__call__", one_sided)
        return helpers.loss_and_gradient(policy, method, pairs)[1]


def test_shares_of_scaled_entries(space, tmp_path):
    policy, scale = helpers.make_policy(space.base), LossScale.for_precision("fp32")
    scale.scale = 2.0**20
    _, plain = helpers.loss_and_gradient(policy, helpers.sft(), helpers.ragged_examples(8))
    _, _, line = traced_step(
        policy, helpers.sft(), helpers.ragged_examples(8), tmp_path / "trace", scale=scale, gradients=True
    )
    near = (plain.abs() * 2.0**20 >= 32752).float().mean().item()
    assert 0.0 < near < 1.0
    assert line["near_fp16_overflow_share"] == pytest.approx(near, abs=1e-4)
    assert line["grad_norm"] == pytest.approx(plain.norm().item(), rel=1e-4)


def test_a_repeated_step_leaves_one_set_of_rows(space, tmp_path):
    policy, scale = helpers.make_policy(space.base), LossScale.for_precision("fp16")
    scale.scale = 2.0**68  # its square overflows the norm's fp32 sum
    _, rows, line = traced_step(policy, helpers.sft(3), helpers.ragged_examples(7), tmp_path / "trace", scale=scale)
    assert scale.skipped_steps > 0 and len(rows) == 7 and line["loss_scale"] == scale.scale < 2.0**68


def run_file(space, folder, name, **sections):
    train = {"max_steps": 6, "logging_steps": 1, **sections.pop("train", {})}
    return space.write(name, sections.pop("method", "dpo"), folder=folder, train=train, **sections)


def test_steps_are_chosen_and_off_leaves_no_folder(space, tmp_path):
    said = run("dpo", run_file(space, tmp_path, "some", trace={"every": 4, "steps": [1, 5]}))
    assert said.code == 0, said.err
    assert sorted(set(read_table(tmp_path / "some/trace", "pairs")["step"].to_pylist())) == [1, 4, 5]
    assert {p.name for p in (tmp_path / "some/trace").iterdir()} == {
        f"{kind}-00000001-00000005.parquet" for kind in ("pairs", "steps")
    }
    run("dpo", run_file(space, tmp_path, "off"))
    assert not (tmp_path / "off/trace").exists()
    without_time = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in metrics(tmp_path / "off")]
    assert [
        {k: v for k, v in r.items() if k != "tokens_per_second"} for r in metrics(tmp_path / "some")
    ] == without_time


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_resumed_run_has_the_trace_of_an_uninterrupted_one(space, tmp_path, monkeypatch, method):
    trace = {"every": 1, "level": "token", "gradients": True}
    run_training(load_config(run_file(space, tmp_path, "whole", method=method, trace=trace)), QUIET)
    path = run_file(space, tmp_path, "stopped", method=method, trace=trace, train={"save_steps": 2})
    original = RunObserver.progress

    def progress(self, state, result):
        original(self, state, result)
        if state.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunObserver, "progress", progress)
        with pytest.raises(InterruptedRunError):
            run_training(load_config(path), QUIET)
    folder = RunFolder(tmp_path / "stopped")
    newest = max(folder.path.glob("step-*"))
    (newest / "manifest.json").write_text("damaged")  # go on from step 4, while the trace knows step 5
    (folder.trace / ".tmp-pairs-00000009-00000009.parquet-1").write_text("cut off")
    run_training(load_config(path), QUIET, resume=True)
    kind = "pairs" if method == "dpo" else "examples"
    for one in (kind, "steps"):
        assert read_table(folder.trace, one).equals(read_table(tmp_path / "whole/trace", one))
    assert not list(folder.trace.glob(".tmp-*"))


def test_a_restart_forgets_the_trace(space, tmp_path, monkeypatch):
    monkeypatch.setattr("lowlevel.reporting.report.panels", lambda runs: panels(runs)[:1])  # one PNG file
    path = run_file(space, tmp_path, "again", trace={"every": 1})
    run("dpo", path)
    assert run("dpo", path, "--restart", "--train.max_steps", 2).code == 0
    assert set(read_table(tmp_path / "again/trace", "pairs")["step"].to_pylist()) == {1, 2}
    assert run("report", tmp_path / "again").code == 0
    assert run("dpo", run_file(space, tmp_path, "again"), "--restart").code == 0
    assert not {"trace", "report", "report.html"} & {path.name for path in (tmp_path / "again").iterdir()}


def test_a_run_that_fails_leaves_the_pairs_of_the_failing_step(space, tmp_path, monkeypatch):
    original, calls = PreferenceLoss.__call__, []

    def failing(self, pairs):
        calls.append(1)
        return original(self, replace(pairs, chosen_logps=pairs.chosen_logps * (math.nan if len(calls) > 5 else 1.0)))

    path = run_file(space, tmp_path, "failing", trace={"every": 1})
    config = load_config(path)
    monkeypatch.setattr(PreferenceLoss, "__call__", failing)
    with pytest.raises(NonFiniteError):
        run_training(config, QUIET)
    rows = read_table(tmp_path / "failing/trace", "pairs").to_pylist()
    assert any(math.isnan(row["loss"]) for row in rows if row["step"] == max(r["step"] for r in rows))


def test_files_of_later_steps_are_forgotten_and_others_are_not_touched(tmp_path):
    for name in ("pairs-00000001-00000004.parquet", "pairs-00000005-00000006.parquet", "mine.parquet"):
        (tmp_path / name).write_text("x")
    drop_after(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.parquet", "pairs-00000001-00000004.parquet"]


def test_datasets_reads_it_alone(space, tmp_path):
    from datasets import load_dataset

    run("dpo", run_file(space, tmp_path, "run", trace={"every": 2}))
    rows = load_dataset(
        "parquet", data_files=str(tmp_path / "run/trace/pairs-*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert len(rows) == 3 * 4 and json.dumps(rows[0])
