"""Loss and KL on general text against full logits in float64, the intervals' use, and what a probe file must have."""

import json

import numpy as np
import pytest
import torch
import workspace

from lowlevel.evaluation import continuations, forgetting
from lowlevel.evaluation.forgetting import Measured, Text, alarms, measure, summarise
from lowlevel.running.reopening import load_run

TEXTS = [
    ("facts", "3 + 4 = 7 the opposite of hot is cold."),
    ("prose", "Sure, the sun is out today. " * 12),
    ("facts", "red door"),
]


@torch.no_grad()
def by_hand(run, ids: list[int], width: int) -> dict[str, tuple[float, float, int]]:
    """By stage the summed loss and KL, and the number of tokens, from Hugging Face's logits of each window."""
    logps = {}
    for stage in run.stages:
        run.activate(stage)
        parts = [ids[start : start + width + 1] for start in range(0, len(ids) - 1, width)]
        logits = [run.policy.causal_lm(torch.tensor([part[:-1]])).logits[0] for part in parts]
        logps[stage.name] = torch.cat(logits).double().log_softmax(1)
    targets, base = torch.tensor(ids[1:])[:, None], logps["base"]
    return {
        name: (float(-own.gather(1, targets).sum()), float((base.exp() * (base - own)).sum()), len(targets))
        for name, own in logps.items()
    }


def test_same_as_full_logits(dpo_run, monkeypatch):
    monkeypatch.setattr(forgetting, "WINDOW", 32)
    monkeypatch.setitem(continuations.POSITIONS, "cpu", 64)
    run = load_run(dpo_run)
    texts = [Text(domain, run.tokenizer._ids([text])[0]) for domain, text in TEXTS]  # the demo's base has no BOS
    found = measure(run, texts)
    for place, text in enumerate(texts):
        for stage, (loss, kl, tokens) in by_hand(run, text.ids, 32).items():
            assert found.tokens[place] == tokens
            assert found.loss[stage][place] == pytest.approx(loss, abs=1e-4)
            assert found.kl[stage][place] == pytest.approx(kl, abs=1e-4)
    assert (found.kl["base"] == 0).all() and (found.kl["dpo"] > 1e-3).all()
    assert found.tokens[1] > 2 * 32  # several windows


def rows_of(increase: float, kl: float, spread: float) -> list[dict]:
    """Twenty texts of ten tokens whose loss changes by `increase` a token, up to +-spread."""
    tokens = np.full(20, 10.0)
    changes = 10 * (increase + spread * np.linspace(-1, 1, 20))
    loss = {"base": 2 * tokens, "sft": 2 * tokens + changes}
    texts = [Text("facts", [])] * 20
    return summarise(texts, Measured(tokens, loss, {"base": 0 * tokens, "sft": kl * tokens}), ["base", "sft"])


@pytest.mark.parametrize(
    ("increase", "kl", "spread", "alarm"),
    [(0.2, 0.05, 0.1, True), (0.2, 0.05, 1.0, False), (0.05, 0.05, 0.0, False), (-0.3, 0.3, 0.1, True)],
)
def test_alarm_needs_the_whole_interval_above_the_bound(increase, kl, spread, alarm):
    rows = rows_of(increase, kl, spread)
    assert rows[0]["stages"]["sft"]["increase"]["value"] == pytest.approx(increase)
    assert rows[0]["stages"]["sft"]["alarm"] is alarm
    assert len(alarms(rows)) == alarm


def test_command(dpo_run, tmp_path):
    probe = tmp_path / "probe.jsonl"
    probe.write_text("".join(json.dumps({"text": text, "domain": domain}) + "\n" for domain, text in TEXTS))
    said = workspace.run("compare", dpo_run, "--probe", probe)
    assert said.code == 0 and "KL from base" in said.out, said.err
    rows = json.loads((dpo_run / "forgetting.json").read_text())["rows"]
    assert [(row["domain"], row["texts"]) for row in rows] == [("facts", 2), ("prose", 1), ("all", 3)]
    assert sum(row["tokens"] for row in rows[:2]) == rows[2]["tokens"]
    page = dpo_run / "report.html"
    assert workspace.run("report", dpo_run).code == 0
    assert "<h2>Forgetting</h2>" in page.read_text() and f"{rows[0]['loss']['base']:.4f}" in page.read_text()
    (dpo_run / "forgetting.json").write_text('{"rows": [{}]}')
    said = workspace.run("report", dpo_run)
    assert said.code == 2 and "forgetting.json cannot be read: remove it, or measure again" in said.err
    (dpo_run / "forgetting.json").unlink()


@pytest.mark.parametrize("row", [{"domain": "x"}, {"text": "a"}, {"text": "good day", "domain": 3}, {"text": ["a"]}])
def test_rows_without_a_text_are_named(dpo_run, tmp_path, row):
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"text": "good day"}) + "\n" + json.dumps(row) + "\n")
    said = workspace.run("compare", dpo_run, "--probe", probe)
    assert said.code == 3 and "probe.jsonl:2: " in said.err
