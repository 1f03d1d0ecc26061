"""`lowlevel plan` and `lowlevel memory`: what they say of the TinyLlama shape, without its weights."""

import io
import json

import helpers
import pytest
import torch
from rich.console import Console
from tinyllama import RECIPE, run_config, write_config

from lowlevel.config.data import DataConfig
from lowlevel.config.offline import DPOConfig
from lowlevel.config.schema import LoraConfig, ModelConfig, RunConfig
from lowlevel.errors import ConfigError
from lowlevel.model.base import load_model_config
from lowlevel.model.memory import Plan, adapter_sizes, forecast, model_shape
from lowlevel.model.placement import Placement
from lowlevel.preflight.plan import show_memory, show_plan
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.assembly import check_inputs
from lowlevel.running.gpu_memory import with_shards

FP16 = Placement(torch.device("cuda"), "fp16")
PAIRS = DataConfig(format="preference")


def test_the_plan_command(tmp_path, capsys):
    config = RunConfig(model=ModelConfig(name=write_config(tmp_path / "model")))
    console = Console(width=100)
    show_plan(config, console, "2GB")
    said = capsys.readouterr().out
    assert "fastest in 2GB" in said and "fastest in 2GB: --train.memory_budget 2GB; or" in said
    assert "train.micro_batch_positions = 2048" in said and "train.dequantize_once = false" in said
    with pytest.raises(ConfigError, match="--budget: expected a size like .15GiB. or .800MiB., got 'much'"):
        show_plan(config, console, "much")


def planned_by(config, budget=None, gpus=1):
    console = Console(file=io.StringIO(), width=160)
    show_plan(config, console, budget, gpus)
    return console.file.getvalue()


def test_the_plan_for_several_gpus(tmp_path):
    config = RunConfig(model=ModelConfig(name=write_config(tmp_path / "model")), lora=LoraConfig(r=64))
    assert "GPUs: each" not in planned_by(config)  # 50,462,720 weights of 4 bytes, each sent and received once
    assert "a step takes about 50% of the time, and 34 ms to sum 202 MB of gradient at 6 GB/s\n" in planned_by(
        config, gpus=2
    )
    unpacked = config.model_copy(update={"data": DataConfig(packing=False)})
    assert "about 50% of the time" in planned_by(unpacked, gpus=3)  # 2 of its 4 micro-batches
    assert "only 4 of them work: raise gradient_accumulation_steps" in planned_by(unpacked, gpus=5)


SHAPE_34B = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64}


def test_the_plan_for_a_base_that_needs_several_gpus(tmp_path):
    name = write_config(tmp_path / "model", **SHAPE_34B, num_key_value_heads=8)
    config = RunConfig(model=ModelConfig(name=name), lora=LoraConfig(r=16))
    with pytest.raises(ConfigError, match=r"15.00 GiB is too little: .* 18.\d\d GiB; .* \(--gpus 2\)"):
        planned_by(config, "15GiB")
    said = planned_by(config, "15GiB", gpus=2)
    weights = 48 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 22016)  # q, o; k, v; gate, up, down
    for row, size in {"base weights": weights // 4, "gathered layers": 3 * weights // 2 // 48}.items():
        assert f"{size // 2**20:,}" in next(line for line in said.splitlines() if row in line)
    assert f"each holds 1/2 of every layer, and gets {weights / 4 / 1e9:,.1f} GB more in each pass" in said
    with pytest.raises(ConfigError, match=r"9.00 GiB is too little: the smallest plan needs 1\d.\d\d GiB"):
        planned_by(config, "9GiB", gpus=2)
    assert "gathered" not in planned_by(config, "24GiB", gpus=2)
    forced = config.model_copy(update={"train": config.train.model_copy(update={"shard_base": True})})
    assert "gathered" in planned_by(forced, "24GiB", gpus=2) and "gathered" not in planned_by(forced, "24GiB")


@pytest.mark.parametrize(
    "tables",
    [
        {"train": {"execution": "graphed"}},
        {"train": {"dequantize_once": True}},
        {"train": {"finetuning_type": "full"}, "model": {"load_in_4bit": False}},
        {"lora": {"use_dora": True}},
        {"lora": {"init_lora_weights": "loftq"}},
        {"method": "dpo", "dpo": {"reference_cache": "cache"}},
        {"trace": {"gradients": True}},
        {"method": "grpo"},
    ],
)
def test_what_needs_the_whole_base_is_refused_with_a_shared_one(tables):
    config = RunConfig(**tables)
    shape = model_shape(load_model_config(config.model), *adapter_sizes(config, None, None))
    assert with_shards(shape, config, FP16, 2, 2**40).shards == with_shards(shape, config, FP16, 1, 1).shards == 1
    with pytest.raises(ConfigError, match=r"while 2 GPUs share the base \(one needs 0.\d\d GiB, and has 0.00\): "):
        with_shards(shape, config, FP16, 2, 2**20)
    own = config.model_copy(update={"train": config.train.model_copy(update={"shard_base": False})})
    assert with_shards(shape, own, FP16, 2, 2**20).shards == 1


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
        show_memory(tmp_path, console)
    report = {"positions": 1024, "components": {"base weights": 484_442_112, "gradient": 201_850_880},
              "phases": {"forward and loss": 1_450_942_464, "backward": 1_560_650_752}, "allocated": 1_221_885_952,
              "kept_for_backward": 106_177_024, "reserved": 1_612_709_888, "device_used": 3_024_945_152}  # fmt: skip
    (tmp_path / "memory.json").write_text(json.dumps(report))
    show_memory(tmp_path, console)
    said = capsys.readouterr().out
    assert "base weights" in said and "462.0" in said and "1,488.4" in said
