"""What a run evaluated is what plain transformers and PEFT say about its adapters."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from plain_models import held_out_chat_loss, plain_base, plain_stack, share
from workspace import metrics

from lowlevel.running.reopening import load_run


def test_the_sft_adapter_is_what_was_evaluated(runs, tokenizer):
    evaluated = [record for record in metrics(runs.sft) if "eval_loss" in record]
    first, *_, last = [record["eval_loss"] for record in evaluated]
    assert [math.log(record["eval_perplexity"]) for record in evaluated] == pytest.approx(
        [r["eval_loss"] for r in evaluated]
    )
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
