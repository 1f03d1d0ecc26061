"""KTO runs from rows to files: resumed, replayed, inspected, traced, compared and verified."""

import io
import math
from dataclasses import replace

import helpers
import pytest
from rich.console import Console
from workspace import PROMPTS, make_workspace, metrics, run, without

import lowlevel as ll
import lowlevel.loop
from lowlevel.checkpoints.tables import read_table
from lowlevel.loop import evaluate_examples
from lowlevel.losses.kto import LabelledLogps, kto
from lowlevel.methods.kto import KTO

ROWS = [
    {"prompt": p, "completion": f"{p[::-1]}!"[: 5 + i % 9] if i % 3 else "no " * (1 + i % 4), "label": bool(i % 3)}
    for i, p in enumerate(PROMPTS)
]
TIMES = ("tokens_per_second", "peak_allocated_gib", "peak_reserved_gib")
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run on a frozen adapter, with everything on; give it an output_dir."""
    space = make_workspace(tmp_path_factory.mktemp("kto"))
    return {
        "model": str(space.base),
        "adapter": helpers.save_random_adapter(space.base, space.folder / "parent"),
        "data": ROWS,
        "eval_data": "holdout",
        "console": QUIET,
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "eval_steps": 3}
        | {"logging_steps": 1, "save_steps": 2, "save_total_limit": 9, "learning_rate": 1e-2},
        "trace": {"every": 2, "level": "token", "gradients": True},
        **{"eval_limit": 5, "max_length": 128, "disable_dropout": False, "undesirable_weight": 1.5},
    }


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return ll.kto(**settings, output_dir=tmp_path_factory.mktemp("whole") / "run")


def test_a_resumed_run_is_the_same_run_bit_for_bit(settings, whole, tmp_path):
    folder = tmp_path / "run"
    for step in ll.steps("kto", **settings, output_dir=folder):
        assert step.examples["desirable"].tolist() == [float(ROWS[row]["label"]) for row in step.rows]
        if step.step == 3:
            break
    ll.kto(**settings, output_dir=folder, resume=True)
    assert without(folder, *TIMES) == without(whole.path, *TIMES)
    file = "adapter/adapter_model.safetensors"
    assert (folder / file).read_bytes() == (whole.path / file).read_bytes()


def test_the_rows_of_a_pair_meet_in_a_step_if_that_is_asked_for(settings, tmp_path):
    pairs = [{"prompt": p, "chosen": "yes " * (1 + i % 3), "rejected": "no"} for i, p in enumerate(PROMPTS)]
    own = {
        **settings,
        "data": pairs,
        "eval_data": None,
        "eval_limit": None,
        "trace": {},
        "data_order": "shuffled_pairs",
    }
    own["train"] = {key: value for key, value in settings["train"].items() if key != "eval_steps"}
    for step in ll.steps("kto", **own, output_dir=tmp_path / "run"):
        assert [row // 2 for row in step.rows[::2]] == [row // 2 for row in step.rows[1::2]] and len(step.rows) == 4
        if step.step == 2:
            break


def test_what_is_logged(whole):
    first, last = without(whole.path, *TIMES)[1], without(whole.path, *TIMES)[-1]
    half = 0.5 * (first["share/desirable"] + 1.5 * first["share/undesirable"])  # but for dropout
    assert first["loss"] == pytest.approx(half, rel=0.1)
    assert {"eval_loss", "eval_kl", "eval_rewards/margins", "eval_logps/ref_undesirable"} <= last.keys()
    assert whole.summary["train_loss"] < first["loss"]


def test_a_replayed_step_is_identical(whole):
    found = whole.replay(5)
    assert found.exact and found.rows and all(row.identical for row in found.rows)
    assert {"kl", "rewards/desirable"} <= {row.quantity for row in found.rows}


def test_the_path_of_an_inspected_row(whole):
    """From the log-probabilities of the path, by hand, to the loss that the step logged without dropout."""
    found = whole.inspect(step=5)
    (kl,), losses = {record.numbers["KL estimate"] for record in found.examples}, []
    ratios = [other.numbers["log-ratio"] for record in found.examples for other in record.others]
    assert len(ratios) == len(found.examples) > 2 and kl == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    for record in found.examples:
        (text,), own = record.texts, record.numbers
        weight, sign = (1.0, 1) if text.name == "desirable" else (1.5, -1)
        assert (text.name == "desirable") == ROWS[record.row]["label"]
        x = 0.1 * (own["policy"] - own["reference"] - max(0.0, kl))
        losses.append(weight / (1 + math.exp(sign * x)))
        assert record.loss == pytest.approx(losses[-1], rel=1e-5)
        assert float(text.columns["adds"].sum()) == pytest.approx(own["reward"], abs=1e-5)
        assert own["weight"] == pytest.approx(sign * losses[-1] * (1 - losses[-1] / weight), rel=1e-4)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_an_inspection_in_print(whole, tmp_path):
    said = run("inspect", whole.path, "--step", 5, "--html", tmp_path / "page.html")
    assert said.code == 2 and "given in Python" in said.err  # the rows are needed again
    from lowlevel.inspection.page import render_page
    from lowlevel.inspection.terminal import print_inspection

    found, out = whole.inspect(step=5), io.StringIO()
    print_inspection(found, Console(file=out, width=140))
    assert all(word in out.getvalue() for word in ("labelled completions", "undesirable", "z₀", "KL estimate"))
    page = render_page(found)
    assert all(f'id="row-{record.row}"' in page for record in found.examples) and "cumulative reward" in page


def test_the_trace_is_that_of_the_step(whole):
    rows = read_table(whole.path / "trace", "examples").to_pylist()
    steps = read_table(whole.path / "trace", "steps").to_pylist()
    logged = {record["step"]: record for record in whole.metrics if "kl" in record}
    assert [step["step"] for step in steps] == [2, 4, 6] and all(step["grad_norm"] > 0 for step in steps)
    for step in steps:
        own = [row for row in rows if row["step"] == step["step"]]
        assert step["examples"] == len(own) == 4
        assert step["kl"] == pytest.approx(logged[step["step"]]["kl"], rel=1e-6)
        assert step["loss"] == pytest.approx(logged[step["step"]]["loss"], rel=1e-6)
        for row in own:
            assert row["reward"] == pytest.approx(0.1 * (row["logps"] - row["ref_logps"]), abs=1e-5)
            assert sum(row["token_logps"]) == pytest.approx(row["logps"], abs=1e-4)
            assert row["desirable"] == ROWS[row["row"]]["label"]


def test_stages_are_compared_by_label(whole):
    from lowlevel.reporting.comparison import compare_stages
    from lowlevel.sampling import Sampling

    rows, opened = whole.opened.held_out(), whole.opened.load(whole.path / "adapter")
    found = compare_stages(opened, rows, [[5, 6]], Sampling(4), console=QUIET)
    assert list(found["scores"]) == ["base", "sft", "kto"]
    sums = [row for row in metrics(whole.path) if "eval_loss" in row][-1]
    for label in ("desirable", "undesirable"):
        ratio = found["scores"]["kto"][f"{label}_logratio"]
        assert 0.1 * ratio == pytest.approx(sums[f"eval_rewards/{label}"], abs=1e-4)
    batches = replace(opened.method, batch_size=1, packing=False).micro_batches(rows)
    again = evaluate_examples(opened.policy, opened.method, batches, prefix="eval_")
    assert again == pytest.approx({key: sums[key] for key in again}, rel=1e-4, abs=1e-4)  # z0 of all rows together


def failures(report):
    return {f"{one.group}: {one.name}" for one in report.checks if not one.ok}


def test_verify_holds_and_finds_planted_faults(whole, monkeypatch):
    """A baseline of a part of the step is what other trainers compute; each fault below has its check."""
    assert failures(whole.verify(step=2)) == set()
    plain, whole_loss = lowlevel.loop.with_baseline, KTO.spec

    def of_the_first(execution, batches, *ranks):
        cut = [replace(batch, mismatched=batch.mismatched[:1]) for batch in batches]
        return plain(execution, cut, *ranks)

    def unclamped(rows: LabelledLogps, *, beta, desirable_weight=1.0, undesirable_weight=1.0):
        return kto(replace(rows, kl=rows.kl.abs() + 0.2), **{"beta": beta, "desirable_weight": desirable_weight},
                   undesirable_weight=undesirable_weight)  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(lowlevel.loop, "with_baseline", of_the_first)
        found = failures(whole.verify(step=2))
        assert {"accounting: step loss", "invariances: 4 x 1 = 1 x 4: loss"} <= found
    with monkeypatch.context() as patch:
        spec = whole_loss.fget(None)
        patch.setattr(KTO, "spec", property(lambda self: replace(spec, function=unclamped)))
        assert {"loss: loss of an example", "accounting: step loss"} <= failures(whole.verify(step=2))
