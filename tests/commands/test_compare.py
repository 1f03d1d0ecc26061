"""`lowlevel compare`: scores and replies of every stage are those of plain transformers and PEFT."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_models import plain_base, plain_stack, share
from workspace import HELD_OUT, PROMPTS, metrics

import lowlevel.reporting.comparison
import lowlevel.running.replies
from lowlevel.methods.choice import build_method
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.reporting.comparison import HeldOutScores, load_held_out, pair_scores, score_rows, sft_scores
from lowlevel.running.reopening import load_run


@pytest.fixture(scope="module")
def compared(runs, cli, tmp_path_factory) -> tuple[Path, str]:
    """`compare` on a copy of the DPO run, after the SFT run that it started from is gone: the run has its parent."""
    folder = tmp_path_factory.mktemp("compared")
    copy = runs.space.copy("dpo", folder)
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(runs.sft), str(folder / "gone")))
    said = cli("compare", copy, "--prompts", 4, "--max-new-tokens", 8, "--show", 2)
    assert said.code == 0, said.err
    return copy, said.out


def test_compare_scores_are_those_of_plain_peft(compared, stages):
    scores = json.loads((compared[0] / "compare.json").read_text())["scores"]
    assert list(scores) == ["base", "sft", "dpo"]
    for name, logps in stages.items():
        loss = float(-logps["chosen"].sum() / logps["lengths"].sum())
        assert scores[name]["chosen_nll"] == pytest.approx(loss, rel=1e-5)
        assert scores[name]["pair_accuracy"] == share(logps["chosen"] - logps["rejected"])
    ratios = {key: stages["dpo"][key] - stages["sft"][key] for key in ("chosen", "rejected")}
    assert scores["dpo"]["reward_accuracy"] == share(ratios["chosen"] - ratios["rejected"])
    assert "reward_accuracy" not in scores["base"]
    assert scores["dpo"]["chosen_nll"] != scores["sft"]["chosen_nll"] != scores["base"]["chosen_nll"]


def test_the_held_out_loss_of_an_sft_run_has_the_name_and_the_value_that_the_run_logs(runs, cli, tmp_path):
    copy = runs.space.copy("sft", tmp_path)
    said = cli("compare", copy, "--prompts", 1, "--max-new-tokens", 1, "--show", 0)
    assert said.code == 0, said.err
    scores = json.loads((copy / "compare.json").read_text())["scores"]
    logged = [line["eval_loss"] for line in metrics(runs.sft) if "eval_loss" in line]
    assert [scores["base"]["eval_loss"], scores["sft"]["eval_loss"]] == pytest.approx([logged[0], logged[-1]], rel=1e-5)
    assert "held-out loss" in said.out and "reward accuracy" not in said.out


def test_compare_measures_rewards_against_the_stage_before(runs, cli, tmp_path, monkeypatch, stages):
    """Accuracies are shares of few pairs and may agree by chance; the log-probabilities behind them do not."""
    copy, seen = runs.space.copy("dpo", tmp_path), []
    monkeypatch.setattr(
        lowlevel.reporting.comparison,
        "pair_scores",
        lambda scored, reference: seen.append((scored, reference)) or pair_scores(scored, reference),
    )
    said = cli("compare", copy, "--prompts", 1, "--max-new-tokens", 1, "--show", 0)
    assert said.code == 0, said.err
    expected = [torch.cat([stages[name]["chosen"], stages[name]["rejected"]]) for name in ("base", "sft", "dpo")]
    for (scored, _), logps in zip(seen, expected, strict=True):
        torch.testing.assert_close(scored.logps, logps, rtol=1e-5, atol=1e-4)
    assert seen[0][1] is None
    for (_, reference), logps in zip(seen[1:], expected[:-1], strict=True):
        torch.testing.assert_close(reference.logps, logps, rtol=1e-5, atol=1e-4)


def test_pair_scores_by_hand():
    """Three pairs: one preferred, one not, one a tie, by log-probability; by ratio to the reference all three."""
    lengths = torch.tensor([2, 2, 4, 1, 1, 1])
    scored = HeldOutScores(torch.tensor([-1.0, -5.0, -2.0, -3.0, -4.0, -2.0]), lengths, torch.zeros(0))
    reference = HeldOutScores(torch.tensor([-2.0, -6.0, -2.0, -3.0, -4.0, -1.5]), lengths, torch.zeros(0))
    assert pair_scores(scored, None) == {"chosen_nll": 1.0, "pair_accuracy": 0.5}
    assert pair_scores(scored, reference)["reward_accuracy"] == 1.0
    assert pair_scores(scored, scored)["reward_accuracy"] == 0.5
    mean = 17 / 11
    assert sft_scores(scored) == {"eval_loss": pytest.approx(mean), "perplexity": pytest.approx(math.exp(mean))}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_examples_that_only_fill_up_a_shape_are_not_scored(runs, method):
    """A GPU's batches are filled up to a few shapes; scores are of the held-out rows alone."""
    run = load_run(getattr(runs, method))
    branches = 2 if method == "dpo" else 1
    rows = load_held_out(runs.space.folder / method)[0][:5]
    plain = score_rows(run, rows)
    run.policy.causal_lm.set_attn_implementation(NAMES["math"])
    spans = Attention(NAMES["math"], "")
    run = replace(run, policy=replace(run.policy, attention=spans))
    vars(run)["method"] = build_method(run.config, spans)
    filled = score_rows(run, rows)  # in the order of its micro-batches
    assert len(filled.logps) == len(plain.logps) == 5 * branches
    for mine, theirs in zip(filled.logps.chunk(branches), plain.logps.chunk(branches), strict=True):
        torch.testing.assert_close(mine.sort().values, theirs.sort().values, rtol=1e-5, atol=1e-4)
    assert torch.equal(filled.lengths.sort().values, plain.lengths.sort().values)
    batch = run.method.micro_batches(rows[:1])[0]
    assert len(batch.real) > len(batch.data_rows), "the batch is filled up"


def test_compare_replies_are_those_of_plain_generate(runs, compared, tokenizer):
    result = json.loads((compared[0] / "compare.json").read_text())
    model = plain_stack(plain_base(runs.space.base), runs.dpo / "parent", runs.dpo / "adapter")
    for stage, active in (("sft", "parent"), ("dpo", ["parent", "dpo"])):
        model.base_model.set_adapter(active)
        replies = []
        for prompt in PROMPTS[-HELD_OUT:][:4]:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 2}
            new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[
                0, ids.shape[1] :
            ].tolist()
            kept = new[: new.index(2)] if 2 in new else new
            replies.append({"text": tokenizer.decode(kept, skip_special_tokens=True), "num_tokens": len(kept),
                            "ended": 2 in new})  # fmt: skip
        assert result["replies"][stage] == replies
        assert result["scores"][stage]["reply_tokens"] == sum(reply["num_tokens"] for reply in replies) / 4
        assert result["scores"][stage]["ended_rate"] == sum(reply["ended"] for reply in replies) / 4


def test_compare_prints_a_table_and_the_replies(compared):
    result = json.loads((compared[0] / "compare.json").read_text())
    table = [line for line in compared[1].splitlines() if line.startswith("│")]
    for line, (stage, scores) in zip(table, result["scores"].items(), strict=True):
        assert stage in line
        assert f"{scores['chosen_nll']:.4f}" in line
        assert f"{scores['pair_accuracy']:.1%}" in line
    for heading in ("chosen NLL", "pair accuracy", "reward accuracy", "reply tokens", "ended with EOS"):
        assert heading in compared[1]
    caption = "reward accuracy: log-ratios to the row above, which is the reference of dpo"
    assert caption in " ".join(compared[1].split())
    assert f"held-out rows {HELD_OUT}, replies per stage 4" in compared[1]
    assert PROMPTS[-HELD_OUT] in compared[1]


def test_compare_of_an_sft_run_prompts_with_the_question_whatever_is_supervised(
    runs, cli, tmp_path, monkeypatch, tokenizer
):
    copy = runs.space.copy("sft", tmp_path)
    config = copy / "config.toml"
    seen = []
    original = lowlevel.reporting.comparison.generate_replies
    monkeypatch.setattr(
        lowlevel.reporting.comparison,
        "generate_replies",
        lambda sampler, tokenizer, prompts, sampling: (
            seen.append([list(p) for p in prompts]) or original(sampler, tokenizer, prompts, sampling)
        ),
    )
    for supervise in ("assistant", "all"):
        config.write_text(config.read_text().replace('supervise = "assistant"', f'supervise = "{supervise}"'))
        said = cli("compare", copy, "--prompts", 2, "--max-new-tokens", 2, "--show", 0)
        assert said.code == 0, said.err
    expected = [f"<|user|>\n{prompt}</s>\n<|assistant|>\n" for prompt in PROMPTS[-HELD_OUT:][:2]]
    assert [[tokenizer.decode(ids) for ids in prompts] for prompts in seen] == [expected] * 4


def test_compare_needs_held_out_rows(runs, cli, tmp_path):
    copy = runs.space.copy("sft", tmp_path)
    config = copy / "config.toml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("eval_")]
    config.write_text("\n".join(lines))
    said = cli("compare", copy)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "the run has no data.eval_source" in said.err
    assert not (copy / "compare.json").exists()
