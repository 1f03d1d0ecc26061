"""`lowlevel eval` from the command line: table, files, groups, stages; and what it refuses before it loads a base."""

import json
from pathlib import Path

import pytest
import workspace

from lowlevel.evaluation.stopping import cut, reply_texts
from lowlevel.running import reopening
from lowlevel.sampling import FastSampler, PlainSampler, Sampling


def evaluate(run: Path, *arguments: object) -> workspace.Said:
    return workspace.run("eval", run, *arguments)


def test_table_and_files(dpo_run, tasks, tmp_path):
    out = tmp_path / "found.json"
    files = f"{tasks['choices']},{tasks['texts']}"
    said = evaluate(dpo_run, "--tasks", files, "--stages", "base,dpo", "--num-fewshot", 1, "--limit", 20, "--out", out)
    assert said.code == 0, said.err
    assert "dpo - base" in said.out and "world_choices" in said.out and "sft" not in said.out
    found = json.loads(out.read_text())
    rows = {(row["task"], row["metric"]): row for row in found["rows"]}
    row = rows["world_choices", "acc"]
    assert (row["items"], row["num_fewshot"], row["higher_is_better"]) == (20, 1, True)
    lines = [json.loads(line) for line in out.with_name("found_items.jsonl").read_text().splitlines()]
    of_task = [line["metrics"] for line in lines if line["task"] == "world_choices"]
    for stage in ("base", "dpo"):
        assert row["stages"][stage]["value"] == pytest.approx(sum(m[stage]["acc"] for m in of_task) / 20)
    change = sum(m["dpo"]["acc"] - m["base"]["acc"] for m in of_task) / 20
    assert row["differences"][0]["value"] == pytest.approx(change, abs=1e-12)
    perplexity = rows["world_texts", "word_perplexity"]
    values = [one["value"] for one in perplexity["stages"].values()]
    assert perplexity["differences"][0]["value"] == pytest.approx(values[1] - values[0])
    assert not (dpo_run / "eval.json").exists()


def test_group(dpo_run, tasks):
    """lm-eval's own value of a group, and the difference of the pooled items, in tasks of 24 and 6."""
    file = Path(tasks["choices"])
    other = file.with_name("other.yaml")
    other.write_text(file.read_text().replace("world_choices", "world_other").replace("choices.jsonl", "shots.jsonl"))
    group = file.with_name("group.yaml")
    metrics = "[{metric: acc, weight_by_size: true}]"
    group.write_text(f"group: world\ntask: [world_choices, world_other]\naggregate_metric_list: {metrics}\n")
    said = evaluate(dpo_run, "--tasks", group)
    assert said.code == 0, said.err
    rows = json.loads((dpo_run / "eval.json").read_text())["rows"]
    (row,) = (row for row in rows if row["task"] == "world")
    assert row["items"] == 30 and len(row["differences"]) == 3
    for change in row["differences"]:
        values = [row["stages"][change[side]]["value"] for side in ("from", "to")]
        assert change["value"] == pytest.approx(values[1] - values[0], abs=1e-12)
        assert change["low"] <= change["value"] <= change["high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "{empty}"], "ValueError: Unknown config shape"),
        (["--tasks", "gone.yaml"], "--tasks gone.yaml: no such file"),
        (["--tasks", "{replies}", "--stages", "base,rlhf"], "--stages rlhf: the run's stages are base, sft, dpo"),
        (["--tasks", "{beams}"], "a task generates with num_beams = 4, which lowlevel eval does not have"),
        (["--tasks", "{lost}"], "FileNotFoundError"),
    ],
)
def test_refused_before_the_base_is_loaded(dpo_run, tasks, monkeypatch, arguments, message):
    def load(*args: object, **keys: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(reopening, "load_policy", load)
    file = Path(tasks["replies"])
    paths = {"replies": file, "beams": file.with_name("beams.yaml"), "lost": file.with_name("lost.yaml")}
    paths["empty"] = file.with_name("empty.yaml")
    paths["empty"].write_text("tag: x\n")
    paths["beams"].write_text(file.read_text().replace("max_gen_toks", "num_beams: 4, max_gen_toks"))
    paths["lost"].write_text(file.read_text().replace("choices.jsonl", "lost.jsonl"))
    said = evaluate(dpo_run, *(argument.format(**paths) for argument in arguments))
    assert said.code == 2 and message in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("kind", [PlainSampler, FastSampler])
def test_a_reply_ends_soon_after_its_stop_text(dpo_run, kind):
    run = reopening.load_run(dpo_run)
    sampler = kind(run.policy.model, run.policy.placement, run.tokenizer.stop_ids)
    prompts = [run.tokenizer.encode_prompt([{"role": "user", "content": f"What is {n} + 4?"}]) for n in range(5)]
    whole = reply_texts(sampler, run.tokenizer, prompts, [], Sampling(20))
    for stops in (["e"], ["is", "t"], ["\n\n"]):
        assert reply_texts(sampler, run.tokenizer, prompts, stops, Sampling(20)) == [cut(text, stops) for text in whole]
    made: list[int] = []
    found = sampler.sample(prompts, Sampling(20), watch=lambda number, ids: made.append(number) or number == 1)
    assert not found[1][0].ended and len(found[1][0].ids) == 1
    assert made.count(1) == 1 < made.count(0)
