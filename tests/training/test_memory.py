"""Forecast, plans, the rehearsal's batch and its list of components; the figures of an H100 are in it as measured."""

from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import bitsandbytes as bnb
import helpers
import numpy as np
import pytest
import torch
from families import EXPERTS, SIZES
from tinyllama import RECIPE, run_config, write_config
from transformers import AutoConfig

from lowlevel.batch.layout import Shape
from lowlevel.config.data import DataConfig
from lowlevel.config.offline import DPOConfig, SFTConfig
from lowlevel.config.schema import LoraConfig, ModelConfig, TrainConfig
from lowlevel.determinism import FIXED, SMALL, workspace_bytes
from lowlevel.errors import ConfigError
from lowlevel.methods.choice import build_method
from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT
from lowlevel.model import dequantised
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.model.base import load_model_config
from lowlevel.model.dequantised import dequantize_once
from lowlevel.model.memory import (
    AdapterSize,
    ModelShape,
    Plan,
    best_plan,
    cost,
    default_plan,
    forecast,
    model_shape,
    planned,
    plans,
)
from lowlevel.model.placement import Placement
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.running.rehearsal import components, largest_batch

FP16 = Placement(torch.device("cuda"), "fp16")
PAIRS = DataConfig(format="preference")
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
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("once", "free", "copied", "said"),
    [
        (None, 4, True, "dequantised once: 0.00 GB in float32"),
        (None, 1.9, False, "dequantised in each pass: a copy takes 0.00 GB, more than half of the free 0.00 GB"),
        (None, 0, False, "in each pass"),  # not known
        (True, 0, True, "dequantised once"),
        (False, 4, False, "dequantised in each pass (train.dequantize_once)"),
    ],
)
def test_on_a_cpu_with_twice_the_memory_of_the_copy_the_weights_are_dequantised_once(
    tiny_base, monkeypatch, once, free, copied, said
):
    """The copy of the tiny base's 2 layers in fp32: q and o 64 x 64, k and v 32 x 64, three of 128 x 64."""
    copy = 4 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    monkeypatch.setattr(dequantised, "available_memory", lambda: int(free * copy))
    policy = helpers.make_policy(tiny_base, quantised=True)
    dequantised.dequantize_as_set(policy, once)
    assert said in dequantised.describe(policy, once)
    found = {isinstance(layer.get_base_layer(), bnb.nn.Linear4bit) for layer in policy.lora_layers}
    assert found == {not copied}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 3072 * 1024),
        ({"memory.max": "max", "memory.current": "10"}, 3072 * 1024),
        ({"memory.max": "2000000", "memory.current": "500000"}, 1_500_000),
        ({"memory/memory.limit_in_bytes": "9000", "memory/memory.usage_in_bytes": "9500"}, 0),
    ],
)
def test_the_available_memory_is_the_machines_or_the_containers(tmp_path, files, available):
    (tmp_path / "meminfo").write_text("MemTotal: 4096 kB\nMemAvailable:   3072 kB\n")
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert dequantised.available_memory(tmp_path / "meminfo", tmp_path) == available
    assert dequantised.available_memory(tmp_path / "none", tmp_path) == 0


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_largest_batch_bounds_every_batch(kind, packing):
    shape = Shape(positions=16, examples=4, longest=64, capacity=96)
    pairs = kind == "dpo"
    method = DPO(DPOConfig(), 2, 64, packing, shape) if pairs else SFT(SFTConfig(), 2, 48, packing, shape)
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
    rows = [SimpleNamespace(row=i, input_ids=ids, labels=ids, weights=None) for i in range(2 * batch)]  # as long as any
    sizes = {made.input_ids.numel() for made in method.micro_batches(rows)}
    assert sizes == {largest_batch(method, rows, len(rows)).input_ids.numel()}
    assert 0 <= max(sizes) - default_plan(TINYLLAMA, config).positions < 8


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LoraConfig().target_modules])
def test_what_is_dequantised_once_is_what_the_forecast_says(tiny_base, targets):
    policy = helpers.make_policy(tiny_base, quantised=True, targets=targets)
    packed = ref(policy.lora_layers[0].base_layer.weight)
    dequantize_once(policy)
    assert packed() is None  # at once: a command collects garbage rarely
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
