"""Forecast, plans, the rehearsal's batch and its list of components; the figures of an H100 are in it as measured."""

import io
import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from families import EXPERTS, SIZES
from rich.console import Console
from transformers import AutoConfig

from lowlevel.commands.plan import show_memory, show_plan
from lowlevel.config import DataConfig, DPOConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from lowlevel.dpo import DPO
from lowlevel.errors import ConfigError
from lowlevel.layout import Shape
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.model.base import load_model_config
from lowlevel.model.memory import (
    AdapterSize,
    ModelShape,
    Plan,
    adapter_sizes,
    best_plan,
    cost,
    default_plan,
    forecast,
    model_shape,
    planned,
    plans,
)
from lowlevel.model.placement import Placement
from lowlevel.model.policy import dequantize_once
from lowlevel.optimizer import build_optimizer
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.assembly import build_method, check_inputs
from lowlevel.running.prefetch import Prefetched
from lowlevel.running.rehearsal import components, largest_batch
from lowlevel.sft import SFT
from lowlevel.workspaces import FIXED, SMALL, workspace_bytes

FP16 = Placement(torch.device("cuda"), "fp16")
PAIRS = DataConfig(format="preference")
RECIPE = AdapterSize(64, LoraConfig().target_modules)
LAYER = 2048 * (2 * 2048 + 2 * 256) + 3 * 2048 * 5632
TINYLLAMA = ModelShape(
    layers=22, hidden=2048, intermediate=5632, query=2048, key=256, vocabulary=32000, linear=22 * LAYER,
    largest=2048 * 5632, other=2 * 32000 * 2048 + 45 * 2048, tied=False, adapted=22 * LAYER,
    trained=64 * 22 * (2 * 4096 + 2 * (2048 + 256) + 3 * 7680), frozen=0,
)  # fmt: skip
# Peaks on an H100 in GiB (torch 2.11, bitsandbytes 0.50.2; benchmarks/results/step_h100.csv, 60090a2) by method,
# positions, recomputed layers, dequantised once, and what is on the host.
MEASURED = {
    ("sft", 1024, 22, False, ""): 1.361,
    ("sft", 1024, 22, False, "embeddings"): 1.239,
    ("sft", 1024, 22, False, "embeddings, inputs"): 1.164,
    ("sft", 4096, 21, False, "embeddings, inputs"): 1.563,
    ("sft", 2048, 20, False, ""): 1.751,
    ("sft", 4096, 0, False, ""): 9.199,
    ("sft", 4096, 0, True, ""): 10.519,
    ("dpo", 2048, 22, False, ""): 1.500,
    ("dpo", 4096, 0, True, ""): 7.902,
}


def run_config(method="sft", **train):
    data = DataConfig(format="messages" if method == "sft" else "preference")
    return RunConfig(method=method, data=data, train=TrainConfig(**train))


def write_config(folder, **changes):
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
                "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    return str(folder)


def test_the_shape_of_tinyllama_by_hand(tmp_path):
    base = load_model_config(ModelConfig(name=write_config(tmp_path / "model")))
    shape = model_shape(base, RECIPE)
    q_and_o, k_and_v, mlp = 2 * 4096, 2 * (2048 + 256), 3 * (2048 + 5632)
    assert shape.trained == 64 * 22 * (q_and_o + k_and_v + mlp) == 50_462_720  # the recipe's trainable parameters
    assert shape == TINYLLAMA
    assert shape.linear == TINYLLAMA.linear and shape.other == TINYLLAMA.other
    assert (shape.query, shape.key, shape.largest) == (2048, 256, 2048 * 5632)
    tied = load_model_config(ModelConfig(name=write_config(tmp_path / "tied", tie_word_embeddings=True)))
    small = model_shape(tied, AdapterSize(2, ("q_proj",)), AdapterSize(3, ("v_proj",)))
    assert small.other == shape.other - 32000 * 2048 and small.tied
    assert (small.trained, small.frozen) == (2 * 22 * 4096, 3 * 22 * (2048 + 256))
    assert small.adapted == 22 * (2048 * 2048 + 2048 * 256)


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_forecast_is_within_2_percent_of_what_was_measured(tmp_path, case):
    method, positions, recomputed, once, on_host = case
    base = load_model_config(ModelConfig(name=write_config(tmp_path / "model")))
    shape = model_shape(base, RECIPE)
    config = run_config(method, offload_activations="inputs" in on_host)
    config = config.model_copy(update={"model": ModelConfig(embeddings_on_host="embeddings" in on_host)})
    found = forecast(shape, config, Plan(positions, recomputed, once), FP16).peak
    assert abs(found / (MEASURED[case] * 2**30) - 1) < 0.02


@pytest.mark.parametrize(("recomputed", "left"), [(22, 2), (1, 1), (0, 0)])
def test_inputs_on_the_host_leave_the_forecast_of_the_gpu(recomputed, left):
    """Two are on the device: that of the layer in work, and the next one, on its way."""
    plan = Plan(1024, recomputed, False)
    plain, offloaded = (forecast(TINYLLAMA, run_config(offload_activations=on), plan, FP16) for on in (False, True))
    each = 1024 * 2048 * 2
    assert (plain.host, offloaded.host) == (0, recomputed * each)
    assert plain.peak - offloaded.peak == (recomputed - left) * each
    assert plain.static == offloaded.static


def test_static_parts_are_exact(tmp_path):
    """The components that the same runs listed, byte for byte where the format leaves no choice."""
    base = load_model_config(ModelConfig(name=write_config(tmp_path / "model")))
    shape = model_shape(base, RECIPE)
    static = forecast(shape, run_config(), Plan(1024, 22, False), FP16).static
    assert static["base weights"] == 484_442_112
    assert static["adapters"] == static["gradient"] == 201_850_880
    assert static["embeddings, LM head, norms"] == 262_328_320
    assert static["quantisation constants"] == pytest.approx(15_542_912, rel=0.02)
    assert forecast(shape, run_config(), Plan(1024, 22, True), FP16).static["base weights"] == 1_937_768_448
    paged = [forecast(shape, run_config(optim=f"paged_adamw_{bits}bit"), Plan(1024, 22, False), FP16).paged
             for bits in (32, 8)]  # fmt: skip
    assert paged == [403_701_760, 100_925_440]
    stacked = model_shape(base, RECIPE, RECIPE)
    assert forecast(stacked, run_config("dpo"), Plan(1024, 22, False), FP16).static["adapters"] == 2 * 201_850_880


def test_experts_that_are_no_linear_layers_are_forecast_unquantised(tmp_path):
    """Two layers of 4 experts with 3 matrices of 64 x 64, 2 bytes a value; routers and norms beside them."""
    base = AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS, head_dim=64)
    shape = model_shape(base, AdapterSize(4, ("q_proj",)))
    embeddings, norms = 2 * 320 * 64, 2 * (2 * 64 + 2 * 64) + 64
    assert shape.linear == 2 * (64 * 256 * 2 + 64 * 128 * 2)
    assert shape.other == 2 * 4 * 3 * 64 * 64 + 2 * 4 * 64 + embeddings + norms
    static = forecast(shape, run_config(), Plan(1024, 2, False), FP16).static
    assert static["base weights"] == shape.linear // 2 and static["embeddings, LM head, norms"] == 2 * shape.other


def test_workspaces_by_hand():
    """4,096 KiB twice and 16 KiB eight times is cuBLAS' documented size below Hopper; eight times 4,096 KiB there."""
    assert workspace_bytes(SMALL) == 8_519_680
    assert [workspace_bytes(setting) for setting in FIXED] == [33_554_432, 131_072]


def test_deterministic_mode_takes_larger_workspaces():
    """Two streams, each with a workspace in the forward pass's thread and one in the backward pass's."""
    config = run_config()
    plan = default_plan(TINYLLAMA, config)
    usual, fixed = (forecast(TINYLLAMA, one, plan, FP16).peak for one in (config, run_config(deterministic=True)))
    assert fixed - usual == 4 * (33_554_432 - 8_519_680)


def test_the_best_plan_fits_and_none_that_fits_is_faster():
    config = run_config()
    previous = float("inf")
    for gib in (1.5, 2, 3, 5, 8, 15, 24):
        budget = int(gib * 2**30)
        best = best_plan(TINYLLAMA, config, FP16, budget)
        assert forecast(TINYLLAMA, config, best, FP16).peak <= budget
        for other in plans(TINYLLAMA, config):
            if cost(TINYLLAMA, config, other) < cost(TINYLLAMA, config, best):
                assert forecast(TINYLLAMA, config, other, FP16).peak > budget
        assert cost(TINYLLAMA, config, best) <= previous
        previous = cost(TINYLLAMA, config, best)
    assert best == Plan(4096, 0, True)  # nothing left to save time with
    with pytest.raises(ConfigError, match=r"0\.50 GiB is too little: the smallest plan needs 1\.\d\d GiB"):
        best_plan(TINYLLAMA, config, FP16, 2**29)


def test_a_plan_becomes_settings_and_the_budget_goes():
    config = planned(run_config(memory_budget="15GiB"), Plan(2048, 7, True))
    train = config.train
    assert (train.micro_batch_positions, train.recomputed_layers, train.dequantize_once) == (2048, 7, True)
    assert train.gradient_checkpointing and train.memory_budget is None
    assert default_plan(TINYLLAMA, config) == Plan(2048, 7, True)
    assert not planned(config, Plan(2048, 0, True)).train.gradient_checkpointing
    offloads = run_config(memory_budget="15GiB", offload_activations=True)
    for recomputed in (7, 0):  # without layers to recompute it would be a contradiction in the run's config.toml
        assert planned(offloads, Plan(2048, recomputed, True)).train.offload_activations == (recomputed > 0)
    assert default_plan(TINYLLAMA, run_config("dpo")) == Plan(2048, 22, False)
    assert default_plan(TINYLLAMA, run_config(gradient_checkpointing=False)) == Plan(1024, 0, False)


def test_dequantising_once_changes_no_bit_of_a_step(tiny_base):
    results = []
    for once in (False, True):
        policy = helpers.make_policy(tiny_base, quantised=True, dropout=0.2)
        if once:
            dequantize_once(policy)
        results.append(helpers.loss_and_gradient(policy, helpers.sft(), helpers.ragged_examples()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_largest_batch_bounds_every_batch(kind, packing):
    shape = Shape(positions=16, examples=4, longest=64, capacity=96)
    pairs = kind == "dpo"
    method = DPO(DPOConfig(), 2, 64, packing, shape) if pairs else SFT(2, 48, packing, shape)
    make = helpers.ragged_pairs if pairs else helpers.ragged_examples
    rows = [row for seed in range(6) for row in make(seed=seed)]
    largest = largest_batch(method, rows, 8)
    if packing:
        assert largest.input_ids.shape == (1, 96)
    for start in range(0, len(rows), 8):
        for batch in method.micro_batches(rows[start : start + 8]):
            assert batch.input_ids.numel() <= largest.input_ids.numel()


@pytest.mark.parametrize(("length", "batch"), [(500, 3), (600, 3), (700, 2), (512, 2)])
def test_no_batch_is_larger_than_the_largest_whatever_the_length(length, batch):
    """A micro-batch's positions are rounded up, and never beyond its capacity; forecast and rehearsal go by that."""
    config = run_config(per_device_train_batch_size=batch)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": length})})
    method = build_method(config, Attention(NAMES["flash"], "for a test"))
    ids = np.arange(length + 1) % 90 + 3
    rows = [SimpleNamespace(row=i, input_ids=ids, labels=ids) for i in range(2 * batch)]  # as long as any
    sizes = {made.input_ids.numel() for made in method.micro_batches(rows)}
    assert sizes == {largest_batch(method, rows, len(rows)).input_ids.numel()}
    assert 0 <= max(sizes) - default_plan(TINYLLAMA, config).positions < 8


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LoraConfig().target_modules])
def test_what_is_dequantised_once_is_what_the_forecast_says(tiny_base, targets):
    policy = helpers.make_policy(tiny_base, quantised=True, targets=targets)
    dequantize_once(policy)
    found = components(policy, build_optimizer(policy.flat.weights, TrainConfig()))
    base = load_model_config(ModelConfig(name=str(tiny_base)))
    shape = model_shape(base, AdapterSize(8, targets))
    fp32 = Placement(torch.device("cuda"), "fp32")
    assert forecast(shape, run_config(), Plan(8, 0, True), fp32).static["base weights"] == found["base weights"]
    full, part = (cost(s, run_config(), Plan(512, 22, True)) for s in (TINYLLAMA, replace(TINYLLAMA, adapted=0)))
    assert part == cost(TINYLLAMA, run_config(), Plan(512, 22, False)) > full


def test_components_count_every_parameter_once(tiny_base, parent_adapter):
    policy = helpers.make_policy(tiny_base, quantised=True, parent=parent_adapter)
    found = components(policy, build_optimizer(policy.flat.weights, TrainConfig()))
    assert found["trained adapter"] == found["gradient"] == 4 * policy.flat.weights.numel()
    assert found["frozen adapter"] == found["trained adapter"]
    assert found["optimizer state"] >= 8 * policy.flat.weights.numel()
    weights = sum(p.nbytes for p in policy.model.parameters())
    named = ("base weights", "embeddings, LM head, norms", "frozen adapter", "trained adapter")
    assert sum(found[name] for name in named) == weights
    assert found["quantisation constants"] > 0


def test_the_plan_command(tmp_path, capsys):
    config = RunConfig(model=ModelConfig(name=write_config(tmp_path / "model")))
    console = Console(width=100)
    show_plan(config, console, "2GB")
    said = capsys.readouterr().out
    assert "fastest in 2GB" in said and "fastest in 2GB: --train.memory_budget 2GB; or" in said
    assert "train.micro_batch_positions = 2048" in said and "train.dequantize_once = false" in said
    with pytest.raises(ConfigError, match="--budget: expected a size like .15GiB. or .800MiB., got 'much'"):
        show_plan(config, console, "much")


def planned_by(config, budget=None):
    console = Console(file=io.StringIO(), width=160)
    show_plan(config, console, budget)
    return console.file.getvalue()


def test_the_plan_command_says_what_goes_to_the_host(tmp_path):
    model = ModelConfig(name=write_config(tmp_path / "model"))
    config = run_config(offload_activations=True).model_copy(update={"model": model})
    said = {budget: planned_by(config, budget) for budget in ("2GB", "15GiB")}
    row = next(line for line in said["15GiB"].splitlines() if "on the host" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["inputs of recomputed layers, on the host", "88", "0"]
    assert "offload_activations = true" in said["2GB"] and "offload_activations = false" in said["15GiB"]


def test_the_plan_command_says_when_room_on_the_host_would_make_it_faster(tmp_path):
    """In 2 GB twice as many positions fit at once; in 15 GiB everything fits as it is."""
    model = ModelConfig(name=write_config(tmp_path / "model"))
    config = run_config().model_copy(update={"model": model})
    said = {budget: planned_by(config, budget) for budget in ("2GB", "15GiB")}
    row = next(line for line in said["2GB"].splitlines() if "positions a micro-batch" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["1,024", "2,048", "4,096"]
    flags = "--train.memory_budget 2GB --model.embeddings_on_host true --train.offload_activations true;"
    assert f"with more on the host: {flags}" in said["2GB"]
    settings = said["2GB"].split("with more on the host:")[1]
    assert "train.micro_batch_positions = 4096" in settings and "train.offload_activations = true" in settings
    assert "model.embeddings_on_host = true" in settings
    assert "on the host" not in said["15GiB"]


def test_a_tied_base_has_its_embedding_on_the_gpu_and_is_not_told_otherwise(tmp_path):
    model = write_config(tmp_path / "model", tie_word_embeddings=True)
    config = run_config().model_copy(update={"model": ModelConfig(name=model)})
    said = planned_by(config, "2GB")
    assert "--model.embeddings_on_host" not in said and "--train.offload_activations true" in said
    row = next(line for line in said.splitlines() if "embeddings, LM head, norms" in line)
    assert len(set(cell.strip() for cell in row.split("│")[2:-1])) == 1
    asked = config.model_copy(update={"model": ModelConfig(name=model, embeddings_on_host=True)})
    shape = model_shape(load_model_config(asked.model), RECIPE)
    static = [forecast(shape, one, Plan(1024, 22, False), FP16).static for one in (config, asked)]
    assert static[0] == static[1]
    with pytest.raises(ConfigError, match="model.embeddings_on_host: this model's input embedding is its LM head too"):
        check_inputs(asked)  # and no weight is there that could have been loaded


def test_a_budget_in_the_run_file_is_what_is_configured(tmp_path):
    model = ModelConfig(name=write_config(tmp_path / "model"))
    config = run_config(memory_budget="15GiB").model_copy(update={"model": model})
    said = planned_by(config, "2GB")
    row = next(line for line in said.splitlines() if "positions a micro-batch" in line)
    assert "as configured (15GiB)" in said and row.split("│")[2].strip() == "4,096"


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_a_loss_that_compares_the_pairs_of_a_micro_batch_takes_no_budget(tmp_path, loss_type):
    """Its micro-batches are part of what is learned."""
    model = ModelConfig(name=write_config(tmp_path / "model"))
    update = {"model": model, "dpo": DPOConfig(loss_type=loss_type)}
    config = run_config("dpo", memory_budget="2GB").model_copy(update=update)
    with pytest.raises(ConfigError, match=f'memory_budget chooses the micro-batches, and loss_type = "{loss_type}"'):
        check_inputs(config)
    said = planned_by(config)
    assert "as configured" in said and "fastest" not in said and f'loss_type = "{loss_type}" compares the pairs' in said


def test_adapters_that_are_there_bring_their_own_size(tmp_path, tiny_base):
    """One that is gone on from, and one underneath; an adapter that is still to be trained counts as this one."""
    helpers.save_random_adapter(tiny_base, tmp_path / "other")

    def sizes(**keys):
        config = RunConfig(**keys)
        folders = [find_adapter(path, "x") for path in (config.model.adapter, config.lora.init_from)]
        found = adapter_sizes(config, *folders)
        return [size and size.rank for size in found]

    other = str(tmp_path / "other")
    assert sizes() == [64, None]
    assert sizes(lora=LoraConfig(init_from=other)) == [4, None]
    assert sizes(method="dpo", data=PAIRS, model=ModelConfig(adapter=other), lora=LoraConfig(r=16)) == [16, 4]
    merged = ModelConfig(adapter=other, adapter_mode="original")
    assert sizes(method="dpo", data=PAIRS, model=merged) == [64, None]
    missing = ModelConfig(name=write_config(tmp_path / "model"), adapter=str(tmp_path / "not yet"))
    for mode, size in (("stack", "385"), ("original", "192")):
        model = missing.model_copy(update={"adapter_mode": mode})
        said = planned_by(run_config("dpo").model_copy(update={"model": model}))
        row = next(line for line in said.splitlines() if "adapters" in line)
        assert row.split("│")[2].strip() == size


def test_a_plan_without_packing_forecasts_what_is_configured_and_says_what_a_budget_needs(tmp_path):
    model = ModelConfig(name=write_config(tmp_path / "model"))
    config = run_config().model_copy(update={"model": model, "data": DataConfig(packing=False)})
    console = Console(file=io.StringIO(), width=100)
    show_plan(config, console, "2GB")
    said = console.file.getvalue()
    assert "as configured" in said and "fastest" not in said and "needs data.packing = true" in said


def test_the_memory_command(tmp_path, capsys):
    console = Console(width=100)
    with pytest.raises(ConfigError, match="holds no memory.json: memory is measured in runs on a GPU"):
        show_memory(tmp_path, console, None)
    report = {"positions": 1024, "components": {"base weights": 484_442_112, "gradient": 201_850_880},
              "phases": {"forward and loss": 1_450_942_464, "backward": 1_560_650_752}, "allocated": 1_221_885_952,
              "kept_for_backward": 106_177_024, "reserved": 1_612_709_888, "device_used": 3_024_945_152}  # fmt: skip
    (tmp_path / "memory.json").write_text(json.dumps(report))
    show_memory(tmp_path, console, tmp_path / "memory.png")
    said = capsys.readouterr().out
    assert "base weights" in said and "462.0" in said and "1,488.4" in said
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_prefetched_batches_are_the_same_and_come_from_a_thread_one_step_ahead():
    made = []

    def make(step):
        made.append((step, threading.current_thread().name))
        return [step]

    batches = Prefetched(make, 4)
    assert batches(0) == [0]
    for _ in range(100):
        if len(made) == 2:
            break
        time.sleep(0.01)
    assert made[1][0] == 1 and made[1][1].startswith("batches") and made[0][1] == threading.current_thread().name
    assert [batches(step) for step in (1, 2, 3)] == [[1], [2], [3]]
    assert sorted(step for step, _ in made) == [0, 1, 2, 3]  # no step twice, and none beyond the last


def test_an_error_in_making_a_batch_comes_with_its_step():
    def make(step):
        if step == 1:
            raise ValueError("row 7 is bad")
        return [step]

    batches = Prefetched(make, 3)
    batches(0)
    with pytest.raises(ValueError, match="row 7 is bad"):
        batches(1)
