"""SFT, DPO, compare, merge and generate on a tiny model; every number against plain transformers and PEFT."""

import json
import math
import os
import shutil
import signal
import struct
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline
from workspace import CHATS, HELD_OUT, PAIRS, PROMPTS, metrics

import lowlevel.commands.compare
import lowlevel.commands.generate
from lowlevel.commands.compare import Scored, pair_scores, sft_scores
from lowlevel.commands.loading import load_run
from lowlevel.config import load_config
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.base import base_sha256
from lowlevel.run import RunObserver

BASE_KEYS = ["step", "loss", "grad_norm", "learning_rate", "loss_scale", "skipped_steps", "epoch", "num_tokens",
             "supervised_tokens", "tokens_per_second", "padding_share", "peak_allocated_gib",
             "peak_reserved_gib"]  # fmt: skip
DPO_KEYS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")] + [
    f"logps/{name}" for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")
]
RUN_FILES = {"config.toml", "environment.json", "data_report.json", "manifest.json", "metrics.jsonl", "run-status.json",
             "run.lock", "summary.json", "loss.png", "data_rows.safetensors", "adapter",
             "step-00000003", "step-00000006"}  # fmt: skip
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


# The same model by plain transformers and PEFT


def plain_base(folder: Path, *, quantised: bool = True):
    settings = {"quantization_config": NF4} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **settings)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # where the CPU has AVX512-BF16, eval mode would compute in bf16
    return model.eval()


def plain_stack(base, parent: Path | None, adapter: Path):
    """Both adapters active at once, as PEFT adds them."""
    if parent is None:
        return PeftModel.from_pretrained(base, adapter).eval()
    model = PeftModel.from_pretrained(base, parent, adapter_name="parent")
    model.load_adapter(adapter, adapter_name="dpo")
    model.base_model.set_adapter(["parent", "dpo"])
    return model.eval()


@torch.no_grad()
def completion_logp(model, tokenizer, prompt: str, completion: str) -> tuple[float, int]:
    """log pi(completion </s> | prompt) and its number of tokens, by a plain forward of one row."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head = tokenizer(text, add_special_tokens=False).input_ids
    tail = tokenizer(completion + "</s>", add_special_tokens=False).input_ids
    logits = model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()), len(tail)


def held_out_logps(model, tokenizer) -> dict[str, torch.Tensor]:
    """Over the held-out pairs: log-probabilities of both completions, and the chosen ones' lengths."""
    rows = PAIRS[-HELD_OUT:]
    chosen = [completion_logp(model, tokenizer, row["prompt"], row["chosen"]) for row in rows]
    rejected = [completion_logp(model, tokenizer, row["prompt"], row["rejected"]) for row in rows]
    return {
        "chosen": torch.tensor([logp for logp, _ in chosen]),
        "rejected": torch.tensor([logp for logp, _ in rejected]),
        "lengths": torch.tensor([length for _, length in chosen]),
    }


def held_out_chat_loss(model, tokenizer) -> float:
    rows = [[m["content"] for m in row["messages"]] for row in CHATS[-HELD_OUT:]]
    scored = [completion_logp(model, tokenizer, *row) for row in rows]
    return -sum(logp for logp, _ in scored) / sum(length for _, length in scored)


@pytest.fixture(scope="module")
def tokenizer(space):
    return AutoTokenizer.from_pretrained(space.base)


@pytest.fixture(scope="module")
def stages(runs, tokenizer) -> dict[str, dict[str, torch.Tensor]]:
    """Held-out log-probabilities of base, SFT and DPO."""
    model = plain_stack(plain_base(runs.space.base), runs.dpo / "parent", runs.dpo / "adapter")
    with model.disable_adapter():
        scores = {"base": held_out_logps(model, tokenizer)}
    model.base_model.set_adapter(["parent", "dpo"])
    scores["dpo"] = held_out_logps(model, tokenizer)
    model.base_model.set_adapter("parent")
    return {**scores, "sft": held_out_logps(model, tokenizer)}


def share(margins: torch.Tensor) -> float:
    return float((margins > 0).double().mean())


# What a run leaves


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_run_folder(runs, method):
    folder: Path = getattr(runs, method)
    parent = {"parent", "stacked"} if method == "dpo" else set()
    assert {path.name for path in folder.iterdir()} == RUN_FILES | parent
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert load_config(folder / "config.toml") == load_config(folder.with_suffix(".toml"))
    status = json.loads((folder / "run-status.json").read_text())
    assert status == {"state": "finished", "step": 6, "checkpoint": "step-00000006", "exit": 0, "error": None}
    summary = json.loads((folder / "summary.json").read_text())
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"} <= set(
        summary
    )
    assert summary["train_samples_per_second"] == pytest.approx(summary["train_steps_per_second"] * 22 / 6)  # 5 x 4 + 2
    assert summary["epoch"] == pytest.approx(6 / 5)  # 18 rows: 5 steps an epoch
    for key in ("train_runtime", "train_samples_per_second", "train_loss", "epoch"):
        assert f"'{key}': {summary[key]:.4f}" in runs.said[method].out
    png = (folder / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", png[16:24])) > 200
    environment = json.loads((folder / "environment.json").read_text())
    assert {"python", "torch", "transformers", "peft", "bitsandbytes", "device", "precision"} <= set(environment)
    assert (environment["torch"].split("+")[0], environment["device"]) == (torch.__version__.split("+")[0], "cpu")
    report = json.loads((folder / "data_report.json").read_text())
    assert (report["train"]["rows_kept"], report["evaluation"]["rows_kept"]) == (18, HELD_OUT)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_manifest(runs, method):
    folder: Path = getattr(runs, method)
    manifest = json.loads((folder / "manifest.json").read_text())
    base = {"name": "tiny", "revision": None, "dtype": "float32", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True}  # fmt: skip
    assert {key: manifest["base"][key] for key in base} == base
    assert manifest["base"]["sha256"] == base_sha256(plain_base(runs.space.base))
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert manifest["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert manifest["reference"] == {"sft": None, "dpo": "base + parent adapter"}[method]
    if method == "dpo":
        names = ("parent/adapter_model.safetensors", "../sft/adapter/adapter_model.safetensors")
        first, second = ((folder / name).read_bytes() for name in names)
        assert first == second
        assert len(manifest["parent_adapter"]) == 64


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_metrics(runs, method):
    folder: Path = getattr(runs, method)
    names = ["loss"] + DPO_KEYS * (method == "dpo")
    logged = [record for record in metrics(folder) if "loss" in record]
    evaluated = [record for record in metrics(folder) if "eval_loss" in record]
    assert [record["step"] for record in logged] == [2, 4, 6]
    assert [record["step"] for record in evaluated] == [0, 3, 6]
    for record in logged:
        assert set(record) == set(BASE_KEYS) | set(names)
        assert all(math.isfinite(value) for value in record.values())
    for record in evaluated:
        assert set(record) == {"step", "epoch"} | {f"eval_{name}" for name in names}
    assert (logged[0]["learning_rate"], logged[0]["loss_scale"]) == (
        pytest.approx(1e-2 * math.cos(math.pi / 12) ** 2),
        1,
    )
    assert logged[-1]["num_tokens"] > logged[-1]["supervised_tokens"] > 0
    for step in (2, 4, 6):
        assert f"step {step}/6  loss " in runs.said[method].out


def test_no_path_of_this_machine_leaves_with_the_adapter(runs, merged):
    for folder in (runs.sft / "adapter", runs.dpo / "adapter", runs.dpo / "parent", merged):
        for file in [*folder.glob("*.json"), *folder.glob("*.toml"), *folder.glob("*.jinja")]:
            text = file.read_text(encoding="utf-8")
            for path in (str(runs.space.folder), str(Path.home()) + "/", os.getcwd() + "/", "/tmp/"):
                assert path not in text, file
        for file in folder.glob("*.safetensors"):
            assert str(runs.space.folder).encode() not in file.read_bytes()


def test_the_run_says_what_it_trains(runs):
    out = runs.said["dpo"].out
    for text in ("4-bit nf4 base, fp32 on CPU", "sdpa with an explicit mask: the run is on a CPU", "dropout off",
                 "18 examples, 6 steps of 2 x 2", "(frozen); loss sigmoid, beta 0.1"):  # fmt: skip
        assert text in out
    assert "dropout 0.1" in runs.said["sft"].out


# The numbers of a run, by plain PEFT


def test_the_sft_adapter_is_what_was_evaluated(runs, tokenizer):
    first, *_, last = [record["eval_loss"] for record in metrics(runs.sft) if "eval_loss" in record]
    base = plain_base(runs.space.base)
    assert held_out_chat_loss(base, tokenizer) == pytest.approx(first, rel=1e-5)
    model = plain_stack(base, None, runs.sft / "adapter")
    assert held_out_chat_loss(model, tokenizer) == pytest.approx(last, rel=1e-5)
    assert last < first - 0.05


def test_the_dpo_adapter_on_its_parent_is_what_was_evaluated(runs, stages):
    first, *_, last = [record for record in metrics(runs.dpo) if "eval_loss" in record]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    for name in ("chosen", "rejected"):
        assert last[f"eval_logps/{name}"] == pytest.approx(float(stages["dpo"][name].mean()), rel=1e-5)
        assert last[f"eval_logps/ref_{name}"] == pytest.approx(float(stages["sft"][name].mean()), rel=1e-5)
        assert first[f"eval_logps/{name}"] == pytest.approx(float(stages["sft"][name].mean()), rel=1e-5)
    policy, reference = stages["dpo"], stages["sft"]
    margins = 0.1 * (policy["chosen"] - reference["chosen"] - policy["rejected"] + reference["rejected"])
    assert last["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert last["eval_rewards/accuracies"] == share(margins)
    assert last["eval_loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), rel=1e-5)
    assert last["eval_loss"] < 0.9 * math.log(2)


def test_the_stacked_adapter_alone_is_the_policy_in_plain_peft(runs):
    both = plain_stack(plain_base(runs.space.base), runs.dpo / "parent", runs.dpo / "adapter")
    one = PeftModel.from_pretrained(plain_base(runs.space.base), runs.dpo / "stacked").eval()
    upper = PeftModel.from_pretrained(plain_base(runs.space.base), runs.dpo / "adapter").eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = both(input_ids=ids).logits
        torch.testing.assert_close(one(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert (upper(input_ids=ids).logits - expected).abs().max() > 1e-3  # what loading adapter/ alone would give
    assert not (runs.sft / "stacked").exists()


def test_stacked_adapters_may_differ_in_rank_scaling_and_layers(tmp_path):
    from lowlevel.model.adapters import write_adapter
    from lowlevel.model.merging import adapter_updates, write_stacked_adapter

    def adapter(name: str, r: int, alpha: int, layers: list[str], **kwargs) -> Path:
        tensors = {}
        for layer in layers:
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(r, 6)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(5, r)
        config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": layers, **kwargs}
        write_adapter(tmp_path / name, tensors, config)
        return tmp_path / name

    torch.manual_seed(0)
    lower, upper = adapter("lower", 2, 8, ["q", "k"]), adapter("upper", 3, 5, ["k", "v"], use_rslora=True)
    write_stacked_adapter(lower, upper, tmp_path / "both")
    sums: dict[str, torch.Tensor] = {}
    for updates in (adapter_updates(lower), adapter_updates(upper)):
        for layer, update in updates.items():
            sums[layer] = sums.get(layer, torch.zeros(5, 6)) + update
    stacked = adapter_updates(tmp_path / "both")
    assert stacked.keys() == sums.keys() == {"q", "k", "v"}
    for layer, update in sums.items():
        torch.testing.assert_close(stacked[layer], update)


def test_a_loaded_run_gives_the_logits_of_plain_peft(runs):
    run = load_run(runs.dpo)
    plain = plain_stack(plain_base(runs.space.base), runs.dpo / "parent", runs.dpo / "adapter")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(run.policy.model(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert [stage.name for stage in run.stages] == ["base", "sft", "dpo"]
        run.activate(run.stages[1])
        plain.base_model.set_adapter("parent")
        torch.testing.assert_close(run.policy.model(input_ids=ids).logits, plain(input_ids=ids).logits)
        run.activate(run.stages[0])
        with plain.disable_adapter():
            torch.testing.assert_close(run.policy.model(input_ids=ids).logits, plain(input_ids=ids).logits)


# lowlevel data


def test_data_shows_what_will_be_trained_on(runs, tmp_path, cli):
    rows = tmp_path / "rows.jsonl"
    long = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    rows.write_text("".join(json.dumps({**row, "n": i}) + "\n" for i, row in enumerate([*CHATS, long])))
    config = runs.space.write("shown", "sft", folder=tmp_path, data={"source": str(rows)})
    text = config.read_text() + '\n[[data.filters]]\ncolumn = "n"\nop = ">="\nvalue = 4\n'
    config.write_text(text)
    said = cli("data", config)
    assert said.code == 0, said.err
    facts = {line.strip(" │┃").split("│")[0].strip(): line for line in said.out.splitlines()}
    for label, number in (("rows read", 25), ("filtered out: not n >= 4", 4), ("dropped: longer than max_length", 1),
                          ("rows kept", 20)):  # fmt: skip
        assert str(number) in facts[label].replace(label, ""), label
    assert "rows.jsonl:25: prompt has " in said.out
    assert f"<|user|>\n{PROMPTS[4]}</s>\n<|assistant|>\n{CHATS[4]['messages'][1]['content']}</s>" in said.out
    assert not (tmp_path / "shown").exists()


# lowlevel compare


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
        assert scores[name]["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert scores[name]["pair_accuracy"] == share(logps["chosen"] - logps["rejected"])
    ratios = {key: stages["dpo"][key] - stages["sft"][key] for key in ("chosen", "rejected")}
    assert scores["dpo"]["reward_accuracy"] == share(ratios["chosen"] - ratios["rejected"])
    assert "reward_accuracy" not in scores["base"]
    assert scores["dpo"]["eval_loss"] != scores["sft"]["eval_loss"] != scores["base"]["eval_loss"]


def test_compare_measures_rewards_against_the_stage_before(runs, cli, tmp_path, monkeypatch, stages):
    """Accuracies are shares of few pairs and may agree by chance; the log-probabilities behind them do not."""
    copy, seen = runs.space.copy("dpo", tmp_path), []
    monkeypatch.setattr(
        lowlevel.commands.compare,
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
    scored = Scored(torch.tensor([-1.0, -5.0, -2.0, -3.0, -4.0, -2.0]), lengths)
    reference = Scored(torch.tensor([-2.0, -6.0, -2.0, -3.0, -4.0, -1.5]), lengths)
    assert pair_scores(scored, None) == {"eval_loss": 1.0, "pair_accuracy": 0.5}
    assert pair_scores(scored, reference)["reward_accuracy"] == 1.0
    assert pair_scores(scored, scored)["reward_accuracy"] == 0.5
    assert sft_scores(scored) == {"eval_loss": pytest.approx(17 / 11)}


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
        assert f"{scores['eval_loss']:.4f}" in line
        assert f"{scores['pair_accuracy']:.1%}" in line
    for heading in ("held-out loss", "pair accuracy", "reward accuracy", "reply tokens", "ended with EOS"):
        assert heading in compared[1]
    assert f"{HELD_OUT} held-out rows, 4 replies a stage" in compared[1]
    assert PROMPTS[-HELD_OUT] in compared[1]


def test_compare_of_an_sft_run_prompts_with_the_question_whatever_is_supervised(
    runs, cli, tmp_path, monkeypatch, tokenizer
):
    copy = runs.space.copy("sft", tmp_path)
    config = copy / "config.toml"
    seen = []
    original = lowlevel.commands.compare.generate_replies
    monkeypatch.setattr(
        lowlevel.commands.compare,
        "generate_replies",
        lambda model, tokenizer, placement, prompts, sampling: (
            seen.append([list(p) for p in prompts]) or original(model, tokenizer, placement, prompts, sampling)
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


# lowlevel merge


def adapter_updates(*folders: Path) -> dict[str, torch.Tensor]:
    """scaling * B A summed over adapters, by module name."""
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        weights = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        for key in weights:
            if ".lora_A." in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = weights[key.replace("lora_A", "lora_B")].double()
                update = config["lora_alpha"] / config["r"] * (b @ weights[key].double())
                total[module] = total.get(module, 0) + update
    return total


def dequantized(model) -> dict[str, torch.Tensor]:
    return {
        name: bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).double()
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def peft_merge(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge in fp32, one adapter after the other, into the weights as they are stored."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()


@torch.no_grad()
def divergence(first, second) -> float:
    """KL in nats a token, over the held-out conversations of these tests as plain text."""
    total, count = 0.0, 0
    for row in CHATS[-HELD_OUT:]:
        ids = torch.tensor([[3 + ord(c) % 200 for m in row["messages"] for c in m["content"]]])
        p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (first, second))
        total, count = total + float((p.exp() * (p - q)).sum()), count + ids.numel()
    return total / count


@pytest.fixture(scope="module")
def other_merges(runs, cli) -> dict[str, Path]:
    folders = {into: runs.space.folder / f"merged-{into}" for into in ("original", "requantized")}
    for into, out in folders.items():
        said = cli("merge", runs.dpo, "--into", into, "--out", out)
        assert said.code == 0, said.err
        assert f"merged into {into} base: {out}" in said.out
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


# Wrong parts


def flip(folder: Path) -> None:
    """One adapter weight changed, the file otherwise well-formed."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_parent_that_is_not_the_runs_own_is_refused(runs, cli, tmp_path):
    copy = runs.space.copy("dpo", tmp_path)
    flip(copy / "parent")
    for command in (
        ("merge", copy, "--out", tmp_path / "merged"),
        ("generate", copy, "--prompt", "a"),
        ("compare", copy),
    ):
        said = cli(*command)
        assert (said.code, said.err.count("\n")) == (4, 1)
        assert "not the adapter that this run stands on" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["dpo"]


def test_a_base_that_is_not_the_runs_own_is_refused(runs, cli, tmp_path):
    copy = runs.space.copy("dpo", tmp_path)
    other = Path(shutil.copytree(runs.space.base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(runs.space.base), str(other)))
    with pytest.raises(CheckpointError, match="is not the one that was trained on"):
        load_run(copy)
    assert cli("compare", copy).code == 4


def test_a_folder_that_is_no_run(runs, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    empty, none = tmp_path / "empty", tmp_path / "none"
    generate = [("generate", folder, "--prompt", "a") for folder in (empty, none)]
    for command in (("merge", empty, "--out", tmp_path / "x"), ("compare", empty), *generate):
        said = cli(*command)
        assert (said.code, said.err.count("\n")) == (2, 1), said.err
    unfinished = runs.space.copy("dpo", tmp_path)
    shutil.rmtree(unfinished / "adapter")
    said = cli("merge", unfinished, "--out", tmp_path / "x")
    assert (said.code, "has the run finished?" in said.err) == (2, True)
    with pytest.raises(ConfigError, match="has the run finished"):
        load_run(unfinished)


# lowlevel generate


def reply(cli, folder: Path, *options: object) -> str:
    said = cli("generate", folder, "--prompt", PROMPTS[1], "--max-new-tokens", 16, *options)
    assert said.code == 0, said.err
    return said.out


def test_run_adapter_and_merged_model_reply_alike(runs, merged, cli):
    texts = [reply(cli, folder) for folder in (runs.dpo, runs.dpo / "adapter", merged)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].strip()
    assert texts[0] != reply(cli, runs.sft)


def test_each_adapter_in_a_run_folder_replies_as_itself(runs, cli, tmp_path):
    assert reply(cli, runs.dpo / "parent") == reply(cli, runs.sft)
    for name in ("adapter", "stacked"):  # not on top of the parent once more
        assert reply(cli, runs.dpo / name) == reply(cli, runs.dpo) != reply(cli, runs.sft)
    copy = runs.space.copy("dpo", tmp_path)
    shutil.rmtree(copy / "adapter")
    shutil.copytree(copy / "step-00000003", copy / "adapter")
    earlier = reply(cli, copy)
    assert reply(cli, runs.dpo / "step-00000003") == earlier != reply(cli, runs.dpo)


def test_an_adapter_from_elsewhere_on_its_base(runs, cli, tmp_path, monkeypatch):
    """It names its base without a folder, so it is found where that name is one."""
    shutil.copytree(runs.sft / "adapter", tmp_path / "taken")
    monkeypatch.chdir(runs.space.folder)
    assert reply(cli, tmp_path / "taken") == reply(cli, runs.sft)


def test_the_same_seed_gives_the_same_text(runs, cli):
    first, again, other, greedy = (
        reply(cli, runs.dpo, "--temperature", heat, "--seed", seed) for heat, seed in ((1, 3), (1, 3), (1, 4), (0, 3))
    )
    assert first == again
    assert len({first, other, greedy}) == 3


def test_the_prompt_is_rendered_as_in_training(runs, cli, monkeypatch):
    from lowlevel.assembly import check_inputs

    seen, encoded, calls = [], [], []
    original, encode = lowlevel.commands.generate._generate, ChatTokenizer.encode_prompt
    monkeypatch.setattr(
        ChatTokenizer, "encode_prompt", lambda self, messages: encoded.append(encode(self, messages)) or encoded[-1]
    )

    def spy(model, tokenizer, placement, prompts, *rest):
        seen.extend(prompts)
        calls.append(encoded[-1] == prompts[0])
        return original(model, tokenizer, placement, prompts, *rest)

    monkeypatch.setattr(lowlevel.commands.generate, "_generate", spy)
    reply(cli, runs.dpo)
    inputs = check_inputs(load_config(runs.dpo / "config.toml"))
    assert seen[0] == inputs.data.train[1].prompt_ids.tolist()  # row 1 of the file: not shuffled
    said = cli("generate", runs.sft, "--prompt", "hi", "--system", "short", "--max-new-tokens", 1)
    assert said.code == 0
    assert calls == [True, True]
    assert inputs.tokenizer.decode(seen[1]) == "<|system|>\nshort</s>\n<|user|>\nhi</s>\n<|assistant|>\n"


# Other ways to start


@pytest.fixture(scope="module")
def original_mode(runs, cli, tmp_path_factory) -> dict:
    """adapter_mode "original": stopped at step 2, resumed, after that compared; the SFT run is a copy."""
    folder = tmp_path_factory.mktemp("original")
    runs.space.copy("sft", folder)
    model = {"adapter": str(folder / "sft"), "adapter_mode": "original"}
    data = {"eval_source": "holdout", "eval_limit": HELD_OUT}
    config = runs.space.write(
        "dpo", "dpo", folder=folder, model=model, data=data, train={"logging_steps": 1, "max_steps": 4}
    )
    progress = RunObserver.progress

    def stop(self, state, result):
        progress(self, state, result)
        if state.step == 2:
            self.on_signal(signal.SIGTERM, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunObserver, "progress", stop)
        stopped = cli("dpo", config)
    assert stopped.code == 143, stopped.err
    return {
        "folder": folder / "dpo",
        "sft": folder / "sft",
        "config": config,
        "resumed": cli("dpo", config, "--resume"),
    }


def test_original_mode_trains_on_the_merged_base(runs, original_mode, tokenizer):
    assert original_mode["resumed"].code == 0, original_mode["resumed"].err
    assert "resumed from step-00000002" in original_mode["resumed"].out
    folder = original_mode["folder"]
    expected = peft_merge(runs.space.base, runs.sft / "adapter")
    for name, tensor in load_file(folder / "base" / "model.safetensors").items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-10.9, atol=2**-24)
    records = metrics(folder)
    first = records[0]
    assert (first["step"], first["eval_loss"]) == (0, pytest.approx(math.log(2), abs=1e-7))
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    reference = held_out_logps(plain_base(folder / "base"), tokenizer)
    for name in ("chosen", "rejected"):
        assert first[f"eval_logps/ref_{name}"] == pytest.approx(float(reference[name].mean()), rel=1e-5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["reference"] == "base"
    assert manifest["base"]["sha256"] == base_sha256(plain_base(folder / "base"))
    assert not (folder / "parent").exists()


def test_original_mode_refuses_another_adapter(original_mode, cli, tmp_path):
    copy = Path(shutil.copytree(original_mode["sft"], tmp_path / "sft"))
    flip(copy / "adapter")
    before = (original_mode["folder"] / "metrics.jsonl").read_bytes()
    said = cli("dpo", original_mode["config"], "--resume", "--model.adapter", copy)
    assert said.code == 2, said.out
    assert (original_mode["folder"] / "metrics.jsonl").read_bytes() == before


def test_original_mode_does_not_take_over_a_base_of_another_adapter(original_mode, cli, tmp_path):
    """What a run leaves that was killed before its first step: a merged base, and no run."""
    left = Path(shutil.copytree(original_mode["folder"] / "base", tmp_path / "run" / "base"))
    adapter = Path(shutil.copytree(original_mode["sft"], tmp_path / "sft"))
    flip(adapter / "adapter")
    command = ("dpo", original_mode["config"], "--train.output_dir", left.parent, "--train.max_steps", 1)
    said = cli(*command, "--model.adapter", adapter)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "is not the base with" in said.err
    assert cli(*command).code == 0


def test_original_mode_can_be_compared_and_used(original_mode, cli):
    folder = original_mode["folder"]
    said = cli("compare", folder, "--prompts", 1, "--max-new-tokens", 4)
    assert said.code == 0, said.err
    scores = json.loads((folder / "compare.json").read_text())["scores"]
    last = metrics(folder)[-1]
    assert list(scores) == ["base", "dpo"]
    assert scores["dpo"]["reward_accuracy"] == last["eval_rewards/accuracies"]
    assert cli("generate", folder, "--prompt", "a", "--max-new-tokens", 4).code == 0


def test_training_goes_on_from_an_adapter(runs, cli, tmp_path):
    """The first step has rate 0 (warm-up), so after it the adapter is what it started from."""
    config = runs.space.write(
        "more",
        "sft",
        folder=tmp_path,
        lora={"init_from": str(runs.sft), "r": None, "lora_alpha": None},
        data={"eval_source": "holdout", "eval_limit": HELD_OUT},
        train={"max_steps": 2, "warmup_steps": 1, "save_steps": 1},
    )
    said = cli("sft", config)
    assert said.code == 0, said.err
    start = load_file(runs.sft / "adapter" / "adapter_model.safetensors")
    first, second = (load_file(tmp_path / "more" / f"step-0000000{n}" / "adapter_model.safetensors") for n in (1, 2))
    assert all(torch.equal(start[name], first[name]) for name in start)
    assert not any(torch.equal(start[name], second[name]) for name in start)
    last = [record["eval_loss"] for record in metrics(runs.sft) if "eval_loss" in record][-1]
    assert metrics(tmp_path / "more")[0]["eval_loss"] == last
    before, after = (
        json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (runs.sft, tmp_path / "more")
    )
    assert (after["r"], after["lora_alpha"]) == (before["r"], before["lora_alpha"]) == (4, 8)


def test_early_stopping_ends_a_run_that_does_not_get_better(runs, cli, tmp_path):
    """At a rate of 1e-30 no loss changes: the first evaluation is the best, the next two have no gain."""
    config = runs.space.write(
        "early",
        "sft",
        folder=tmp_path,
        data={"eval_source": "holdout", "eval_limit": 2},
        train={"learning_rate": 1e-30, "eval_steps": 1, "early_stopping_patience": 2, "max_steps": 10},
    )
    said = cli("sft", config)
    assert said.code == 0, said.err
    assert [record["step"] for record in metrics(tmp_path / "early") if "eval_loss" in record] == [0, 1, 2, 3]
    status = json.loads((tmp_path / "early" / "run-status.json").read_text())
    assert (status["state"], status["step"], status["checkpoint"]) == ("finished", 3, "step-00000003")
    assert (tmp_path / "early" / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_trained_in_fp16_on_a_gpu_can_be_used_without_one(runs, cli, tmp_path):
    copy = runs.space.copy("dpo", tmp_path)
    config, manifest = copy / "config.toml", copy / "manifest.json"
    config.write_text(config.read_text().replace('precision = "auto"', 'precision = "fp16"'))
    manifest.write_text(manifest.read_text().replace('"float32"', '"float16"'))
    assert reply(cli, copy) == reply(cli, runs.dpo)
    said = cli("compare", copy, "--prompts", 1, "--max-new-tokens", 2)
    assert said.code == 0, said.err
