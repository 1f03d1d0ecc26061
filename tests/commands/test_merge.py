"""`lowlevel merge`: the three kinds of merged base against PEFT's own merge; a wrong merge is not written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_models import adapter_updates, dequantized, divergence, peft_merge, plain_base, plain_stack
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from workspace import HELD_OUT, PAIRS, PROMPTS, reply

from benchmarks.merge import held_out_loss
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.running.merge import measure, probe_rows
from lowlevel.running.reopening import LoadedRun, load_run


@pytest.fixture(scope="module")
def other_merges(runs, cli) -> dict[str, Path]:
    folders = {into: runs.space.folder / f"merged-{into}" for into in ("original", "requantized")}
    for into, out in folders.items():
        said = cli("merge", runs.dpo, "--into", into, "--out", out)
        assert said.code == 0, said.err
        assert f"merged into {into} base\n" in said.out and f"written: {out}\n" in said.out
    return folders


def test_merged_into_the_dequantized_base(runs, merged):
    base = plain_base(runs.space.base)
    weights, updates = dequantized(base), adapter_updates(runs.dpo / "parent", runs.dpo / "adapter")
    assert updates.keys() == weights.keys()
    folder = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    assert folder.dtype == torch.float16
    untouched = plain_base(runs.space.base, quantised=False)
    expected = {name: p.double() for name, p in untouched.named_parameters()}
    expected.update({f"{name}.weight": weight + updates[name] for name, weight in weights.items()})
    for name, parameter in folder.named_parameters():  # one rounding to fp16: half a unit in the last place
        torch.testing.assert_close(parameter.double(), expected[name], rtol=2**-10.9, atol=2**-25)
    with torch.no_grad():
        for name, parameter in untouched.named_parameters():
            parameter.copy_(expected[name])
    loaded = plain_base(merged, quantised=False)
    assert divergence(untouched, loaded) < 5e-6
    trained = plain_stack(base, runs.dpo / "parent", runs.dpo / "adapter")
    kl = divergence(trained, loaded)
    assert kl < 1e-5
    record = json.loads((merged / "lowlevel_merge.json").read_text())
    assert record["fidelity"]["kl"] <= 1e-5
    assert record["fidelity"]["same_top_token"] > 0.99
    assert record["into"] == "dequantized"
    assert record["manifest"] == json.loads((runs.dpo / "manifest.json").read_text())


def test_the_probe_measures_the_held_out_loss(runs, merged, stages):
    """All held-out pairs are probed, both completions of each: their loss under the model that was trained."""
    fidelity = json.loads((merged / "lowlevel_merge.json").read_text())["fidelity"]
    total = -float(stages["dpo"]["chosen"].sum() + stages["dpo"]["rejected"].sum())
    tokens = int(stages["dpo"]["lengths"].sum()) + sum(len(row["rejected"]) + 1 for row in PAIRS[-HELD_OUT:])
    assert fidelity["tokens"] == tokens
    assert fidelity["training_time_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert fidelity["loss"] == pytest.approx(total / tokens, rel=1e-3)


@pytest.fixture
def filled(runs) -> LoadedRun:
    """The DPO run with what a GPU with span attention has: batches filled up to few shapes."""
    run = load_run(runs.dpo)
    run.policy.causal_lm.set_attn_implementation(NAMES["math"])
    spans = Attention(NAMES["math"], "")
    return replace(run, opened=replace(run.opened, attention=spans), policy=replace(run.policy, attention=spans))


def test_positions_that_only_fill_up_a_shape_are_not_measured(runs, merged, filled):
    rows = probe_rows(runs.dpo)
    batches = [batch for row in rows for batch in filled.method.micro_batches([row])]
    assert any(len(batch.scored_positions) > batch.num_scored for batch in batches)
    own = filled.config.model_copy(update={"dpo": filled.config.dpo.model_copy(update={"loss_type": "not_here"})})
    found = measure(replace(filled, config=own), rows, merged)  # a loss that this process does not know
    expected = json.loads((merged / "lowlevel_merge.json").read_text())["fidelity"]
    assert found.tokens == expected["tokens"]
    assert found.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert found.training_time_loss == pytest.approx(expected["training_time_loss"], rel=1e-5)
    assert found.kl == pytest.approx(expected["kl"], rel=1e-2)
    assert found.same_top_token == expected["same_top_token"]


def test_the_benchmark_of_merging_leaves_them_out_too(merged, filled):
    expected = json.loads((merged / "lowlevel_merge.json").read_text())["fidelity"]
    loss = held_out_loss(filled, filled.policy.causal_lm, filled.policy.attention)
    assert loss == pytest.approx(expected["training_time_loss"], rel=1e-5)


def test_merged_into_the_original_base(runs, merged, other_merges):
    expected = peft_merge(runs.space.base, runs.dpo / "parent", runs.dpo / "adapter")
    found = load_file(other_merges["original"] / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-10.9, atol=2**-24)
    other = load_file(merged / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(found[name].float(), other[name].float(), rtol=1e-2)


def test_merged_and_requantized(cli, other_merges):
    config = json.loads((other_merges["requantized"] / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"] is True
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    found = dequantized(AutoModelForCausalLM.from_pretrained(other_merges["requantized"], device_map={"": "cpu"}))
    expected = dequantized(plain_base(other_merges["original"]))
    assert len(found) == 14
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-6)
    assert reply(cli, other_merges["requantized"]).strip()


def test_a_merge_is_an_ordinary_model(runs, merged, cli):
    generate = pipeline("text-generation", model=str(merged), device="cpu", dtype=torch.float32)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    reply = generate(messages, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
    assert reply.strip() == cli("generate", merged, "--prompt", PROMPTS[0], "--max-new-tokens", 12).out.strip()
    assert generate.tokenizer.chat_template == AutoTokenizer.from_pretrained(runs.space.base).chat_template
    assert generate.model.generation_config.eos_token_id in (2, [2])


def test_a_merge_never_overwrites(runs, cli, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    said = cli("merge", runs.dpo, "--out", tmp_path / "there")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "exists" in said.err
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "file"]


def test_what_comes_while_a_merge_is_made_is_not_replaced(runs, cli, tmp_path, monkeypatch):
    import lowlevel.running.merge

    out = tmp_path / "not yet there" / "out"
    original = lowlevel.running.merge.measure

    def measure(*arguments):
        out.mkdir()
        (out / "file").write_text("mine")
        return original(*arguments)

    monkeypatch.setattr(lowlevel.running.merge, "measure", measure)
    said = cli("merge", runs.dpo, "--out", out)
    assert said.code == 2 and "exists" in said.err
    assert [path.name for path in tmp_path.rglob("*")] == ["not yet there", "out", "file"]


def test_a_wrong_merge_is_not_written(runs, cli, tmp_path, monkeypatch):
    import lowlevel.model.merging

    original = lowlevel.model.merging.adapter_updates
    monkeypatch.setattr(
        lowlevel.model.merging, "adapter_updates", lambda folder: {k: 1.5 * v for k, v in original(folder).items()}
    )
    said = cli("merge", runs.dpo, "--out", tmp_path / "merged")
    assert said.code == 4
    assert "exceeds 1e-05" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_eager_attention_merges_and_replies(runs, cli, tmp_path):
    config = runs.space.write(
        "eager", "sft", folder=tmp_path, model={"attn_implementation": "eager"}, train={"max_steps": 2}
    )
    assert cli("sft", config).code == 0
    said = cli("merge", tmp_path / "eager", "--out", tmp_path / "merged")
    assert said.code == 0, said.err
    replies = {
        cli("generate", folder, "--prompt", "a", "--max-new-tokens", 8).out
        for folder in (tmp_path / "eager", tmp_path / "merged")
    }
    assert len(replies) == 1


def test_an_unquantised_run_merges_into_the_same_weights_either_way(runs, cli, tmp_path):
    config = runs.space.write("plain", "sft", folder=tmp_path, model={"load_in_4bit": False}, train={"max_steps": 2})
    assert cli("sft", config).code == 0
    assert json.loads((tmp_path / "plain" / "manifest.json").read_text())["base"]["load_in_4bit"] is False
    for into in ("dequantized", "original"):
        said = cli("merge", tmp_path / "plain", "--into", into, "--out", tmp_path / into)
        assert said.code == 0, said.err
    first, second = (load_file(tmp_path / into / "model.safetensors") for into in ("dequantized", "original"))
    assert all(torch.equal(first[name], second[name]) for name in first)
