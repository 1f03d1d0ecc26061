"""Reward models: steps of any layout, the reward of a plain transformers model, whole runs and their commands."""

import io
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from workspace import PAIRS, PROMPTS, make_workspace, run, without

import lowlevel as ll
import lowlevel.methods.reward
from lowlevel.batch.layout import Shape
from lowlevel.checkpoints.tables import read_table
from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.errors import CheckpointError
from lowlevel.loop import evaluate_examples
from lowlevel.model.adapters import save_adapter
from lowlevel.model.base import load_base
from lowlevel.model.build import build_policy
from lowlevel.model.policy import SCORE, TRAINED

BOUND = 1e-6
TIMES = ("tokens_per_second", "peak_allocated_gib", "peak_reserved_gib")
QUIET = Console(file=io.StringIO())
RATED = [{**pair, "margin": 0.1 * (i % 3)} for i, pair in enumerate(PAIRS)]


def layouts(count, **config):
    for size in sorted({count, 4, 2, 1}):
        yield helpers.reward(size, **config)
    yield helpers.reward(1, packing=True, **config)
    yield replace(helpers.reward(2, packing=True, **config), shape=Shape(32, 8, 64, 256))  # with dummy pairs


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("count", [8, 1])
def test_a_step_does_not_depend_on_its_split(tiny_base, count, dropout):
    policy, found = helpers.make_policy(tiny_base, dropout=dropout, seed=1, reward_head=True), []
    for method in layouts(count, disable_dropout=False, center_rewards_coefficient=0.1):
        result = helpers.step(policy, method, helpers.ragged_pairs(count))
        found.append((result, policy.flat.grad.clone()))
    (expected, gradient), *others = found
    assert expected.count == count and float(gradient[-64:].norm()) > 0.05  # the head's
    for result, other in others:
        assert result.metrics == pytest.approx(expected.metrics, rel=BOUND, abs=BOUND)
        largest, mean = helpers.drifts(other, gradient)
        assert largest <= 2 * BOUND and mean <= BOUND, (largest, mean)


@pytest.mark.parametrize("packing", [False, True], ids=["two rows", "shared prompt"])
def test_the_same_rewards_and_gradient_in_plain_transformers_and_peft(tiny_base, tmp_path, packing):
    """The saved folder opens without this package. One row at a time without a pad id: the last position is read."""
    policy, pairs = helpers.make_policy(tiny_base, reward_head=True), helpers.ragged_pairs()
    ends = np.array([2, 2])  # a completion that ends with the padding's id, as with pad = eos
    pairs[1] = replace(pairs[1], chosen_ids=np.concatenate([pairs[1].chosen_ids, ends]))
    result = helpers.step(policy, helpers.reward(2, packing=packing), pairs)
    save_adapter(policy.model, TRAINED, tmp_path / "adapter", str(tiny_base))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = None
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).double()
    rewards = [
        [model(input_ids=torch.from_numpy(np.concatenate([pair.prompt_ids, ids]))[None]).logits.squeeze()
         for ids in (pair.chosen_ids, pair.rejected_ids)]
        for pair in pairs
    ]  # fmt: skip
    chosen, rejected = (torch.stack(side) for side in zip(*rewards, strict=True))
    assert result.metrics["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
    assert result.metrics["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    loss = -logsigmoid(chosen - rejected).mean()
    assert result.loss == pytest.approx(loss.item(), rel=BOUND)
    loss.backward()
    own = policy.flat.named_grads()
    plain = {name.replace("modules_to_save.default.", "").replace(".default.", ".trained."): p.grad
             for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    assert plain.keys() == own.keys() and SCORE in own
    assert max(helpers.drifts(*(torch.cat([side[n].flatten() for n in own]) for side in (own, plain)))) < 5e-6


def test_the_head_of_an_adapter_to_continue(tiny_base, tmp_path):
    """An SFT adapter gets a new head; a reward model brings its own, and one without its head is damaged."""
    policies = {"sft": helpers.make_policy(tiny_base), "reward": helpers.make_policy(tiny_base, reward_head=True)}
    with torch.no_grad():
        policies["reward"].reward_head.fill_(0.5)
    for name, policy in policies.items():
        save_adapter(policy.model, TRAINED, tmp_path / name, str(tiny_base))

    def head(name, **options):
        base = load_base(ModelConfig(name=str(tiny_base), load_in_4bit=False), helpers.CPU)
        own = {"seed": 3, "init_from": tmp_path / name, **options}
        return build_policy(base, LoraConfig(), helpers.CPU, **own).reward_head

    assert 0 < float(head("sft", reward_head=True).detach().std()) < 0.05 and head("sft") is None
    assert bool((head("reward", reward_head=True) == 0.5).all())
    weights = load_file(tmp_path / "reward/adapter_model.safetensors")
    del weights[SCORE]
    save_file(weights, tmp_path / "reward/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 adapter tensors missing: base_model.model.score.weight"):
        head("reward", reward_head=True)


def test_padding_is_no_token(tiny_base):
    """A completion of the id that pads rows is read at its own last token, whatever lies beside it."""
    policy, pairs = helpers.make_policy(tiny_base, reward_head=True), helpers.ragged_pairs(3)
    zeros = replace(pairs[1], chosen_ids=np.array([0, 0, 0, 0]))
    alone = helpers.step(policy, helpers.reward(1), [zeros]).metrics
    result = helpers.step(policy, helpers.reward(3), [pairs[0], zeros, pairs[2]])
    others = helpers.step(policy, helpers.reward(2), [pairs[0], pairs[2]]).metrics
    total = 3 * result.metrics["rewards/chosen"] - 2 * others["rewards/chosen"]
    assert total == pytest.approx(alone["rewards/chosen"], abs=1e-5)


def test_held_out_pairs_are_calibrated(tiny_base):
    policy, pairs = helpers.make_policy(tiny_base, reward_head=True), helpers.ragged_pairs(7)
    scores = [evaluate_examples(policy, m, m.micro_batches(pairs), prefix="eval_") for m in layouts(7)]
    assert all(one == pytest.approx(scores[0], abs=1e-5) for one in scores)
    assert 0.0 < scores[0]["eval_brier"] < 1.0 and {"eval_calibration_error", "eval_rewards/accuracies"} <= {*scores[0]}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def settings(space):
    """A run on a frozen adapter, with everything on; give it an output_dir."""
    return {
        "model": str(space.base),
        "adapter": helpers.save_random_adapter(space.base, space.folder / "parent"),
        "data": RATED,
        "columns": ["margin"],
        "eval_data": "holdout",
        "load_in_4bit": False,
        "console": QUIET,
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "eval_steps": 3}
        | {"logging_steps": 1, "save_steps": 2, "save_total_limit": 9, "learning_rate": 1e-2},
        "trace": {"every": 2, "gradients": True},
        **{"eval_limit": 5, "max_length": 128, "disable_dropout": False, "center_rewards_coefficient": 0.01},
    }


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return ll.reward(**settings, output_dir=tmp_path_factory.mktemp("whole") / "run")


def test_a_resumed_run_is_the_same_run_bit_for_bit(settings, whole, tmp_path):
    folder = tmp_path / "run"
    for step in ll.steps("reward", **settings, output_dir=folder):
        if step.step == 3:
            break
    ll.reward(**settings, output_dir=folder, resume=True)
    assert without(folder, *TIMES) == without(whole.path, *TIMES)
    for file in ("adapter", "stacked"):
        name = f"{file}/adapter_model.safetensors"
        assert (folder / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_replayed_step_is_identical(whole):
    found = whole.replay(5)
    assert found.exact and found.rows and all(row.identical for row in found.rows)
    assert {"rewards/margins", "rewards/accuracies"} <= {row.quantity for row in found.rows}


def test_the_inspected_step_is_the_one_that_was_logged(whole):
    found, out = whole.inspect(step=1), io.StringIO()
    for record in found.examples:
        chosen, rejected = record.values("reward")
        d = torch.tensor(chosen - rejected - record.numbers["rated margin"]).double()
        centre = 0.01 * (chosen + rejected) ** 2
        assert record.loss == pytest.approx(float(-logsigmoid(d)) + centre, rel=1e-5)
        assert record.numbers["rated margin"] == pytest.approx(RATED[record.row]["margin"])
        assert record.numbers["centring"] == pytest.approx(centre, rel=1e-4)
        assert float(record.running("adds")[-1]) == pytest.approx(record.numbers["margin"], abs=1e-6)
        slope, weights = float(torch.sigmoid(-d)), record.values("weight")
        assert sum(weights) == pytest.approx(-0.04 * (chosen + rejected), abs=1e-6)
        assert weights[0] - weights[1] == pytest.approx(2 * slope, rel=1e-5)
    from lowlevel.inspection.terminal import print_inspection

    print_inspection(found, Console(file=out, width=140))
    assert all(word in out.getvalue() for word in ("rated margin", "w · h of the last token", "centring"))


def test_the_trace_is_that_of_the_step(whole):
    rows = read_table(whole.path / "trace", "examples").to_pylist()
    logged = {record["step"]: record for record in whole.metrics if "loss" in record}
    for step in read_table(whole.path / "trace", "steps").to_pylist():
        own = [row for row in rows if row["step"] == step["step"]]
        assert len(own) == step["pairs"] == 4 and step["reward_head_grad_norm"] > 0
        assert sum(row["margin"] for row in own) / 4 == pytest.approx(logged[step["step"]]["rewards/margins"], rel=1e-5)


def test_a_pair_is_scored_as_in_training_and_as_two_completions(whole, capsys):
    """By the run, and by the code of the model card, in plain transformers and PEFT."""
    held_out = RATED[-5:]
    pairs = whole.score(held_out)
    last = [record for record in whole.metrics if "eval_loss" in record][-1]
    assert sum(line["margin"] for line in pairs) / 5 == pytest.approx(last["eval_rewards/margins"], abs=1e-5)
    single = whole.score([{"prompt": p["prompt"], "completion": p["chosen"]} for p in held_out])
    assert [x["reward"] for x in single] == pytest.approx([x["chosen_reward"] for x in pairs], abs=1e-6)
    code = (whole.path / "stacked/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "."', f"folder = {str(whole.path / 'stacked')!r}"), {})  # noqa: S102 - as the card says
    (own,) = whole.score([{"prompt": "Hello", "completion": "Hi!"}])
    assert float(capsys.readouterr().out) == pytest.approx(own["reward"], abs=1e-4)


def failures(report):
    return {f"{one.group}: {one.name}" for one in report.checks if not one.ok}


def test_verify_holds_and_finds_planted_faults(whole, monkeypatch):
    assert failures(whole.verify(step=2)) == set()
    plain = lowlevel.methods.reward.read_segment

    def one_early(*parts):
        segment = plain(*parts)
        return replace(segment, targets=np.roll(segment.targets, -1))

    def whole_margin(pairs, *, center_rewards_coefficient=0.0):
        return -logsigmoid(pairs.margins) + center_rewards_coefficient * (pairs.chosen + pairs.rejected) ** 2

    with monkeypatch.context() as patch:
        patch.setattr(lowlevel.methods.reward, "read_segment", one_early)
        assert {"masking: replies end with end of turn", "masking: targets as the rows say"} <= failures(whole.verify())
    spec = replace(whole.opened.method().spec, function=whole_margin)
    with monkeypatch.context() as patch:
        patch.setattr(lowlevel.methods.reward.Reward, "spec", property(lambda self: spec))
        assert {"loss: loss of a pair", "accounting: step loss"} <= failures(whole.verify())


def test_commands(space, tmp_path):
    """Train, score pairs and completions, choose the best of some replies; other uses of a reward run are refused."""
    path, sft = space.write("commands", "reward", folder=tmp_path), space.write("talker", "sft", folder=tmp_path)
    assert run("reward", path).code == 0 and run("sft", sft).code == 0
    folder, talker, out = tmp_path / "commands", tmp_path / "talker", tmp_path / "scores.jsonl"
    said = run("score", folder, "--data", space.dpo_rows, "--out", out)
    assert said.code == 0 and f"{len(PAIRS)} pairs: accuracy" in said.out and "brier" in said.out
    assert len(out.read_text().splitlines()) == len(PAIRS)
    rows = helpers.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": p, "completion": "yes"} for p in PROMPTS[:3]])
    assert "3 completions: mean reward" in run("score", folder, "--data", rows).out
    best = run("generate", talker, "--prompt", "hi", "--best-of", 3, "--reward", folder, "--max-new-tokens", 4)
    scores = [float(line.split()[1]) for line in best.err.splitlines() if line.startswith("reward ")]
    assert best.code == 0 and scores and scores == sorted(scores, reverse=True)
    bad = helpers.write_jsonl(
        tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}]
    )
    for code, words, arguments in (
        (3, "bad.jsonl:2: empty completion", ("score", folder, "--data", bad)),
        (2, "is a sft run", ("score", talker, "--data", rows)),
        (2, "is a reward model", ("generate", folder, "--prompt", "hi")),
        (2, "is a reward model", ("merge", folder, "--out", tmp_path / "merged")),
        (2, "the stages before it give no rewards: use lowlevel score", ("compare", folder)),
        (2, "belong together", ("generate", talker, "--prompt", "hi", "--best-of", 3)),
        (2, "is a reward model", ("dpo", space.write("x", "dpo", folder=tmp_path), "--model.adapter", folder)),
        (2, "a rated margin is", ("reward", path, "--data.columns", '["x"]', "--train.output_dir", tmp_path / "y")),
    ):  # fmt: skip
        refused = run(*arguments)
        assert refused.code == code and words in refused.err, (arguments, refused.err)
