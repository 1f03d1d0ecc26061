"""Training steps of a large Llama shape with random weights, quantised layer by layer on the GPU, under a memory cap.

    python -m benchmarks.largest --hidden 6144 --intermediate 16384 --layers 50 --heads 48 --kv-heads 8
    torchrun --nproc-per-node 2 -m benchmarks.largest --rows 2     # rows of a step, shared among the GPUs of torchrun
    torchrun ... --rows 2 --shard                                  # and each GPU holds a part of every layer

One row of 512 tokens a micro-batch, r = 16 on all seven projections, every layer recomputed, paged 8-bit AdamW, fp16;
on the host lie the embeddings and, unless --no-offload is given, the layers' inputs. Prints one CSV line: parameters,
forecast, measured peak, seconds a step, losses.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks.meter import limit_memory, machine, synchronize
from benchmarks.runner import commit
from lowlevel.config.data import DataConfig
from lowlevel.config.schema import LoraConfig, ModelConfig, RunConfig, TrainConfig
from lowlevel.execution import WithFallback
from lowlevel.loop import optimizer_step
from lowlevel.methods.choice import build_method
from lowlevel.model.attention_choice import NAMES, Attention, choose_attention, register
from lowlevel.model.base import empty_model
from lowlevel.model.build import build_policy
from lowlevel.model.linear import install_dequantising_products, quantised_states
from lowlevel.model.memory import AdapterSize, default_plan, forecast, model_shape
from lowlevel.model.offload import move_embeddings_to_host
from lowlevel.model.placement import Placement, choose_placement
from lowlevel.model.sharding import join_layers, shard_layer
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.ranks import Ranks, joined
from lowlevel.running.assembly import choose_execution
from lowlevel.running.endings import Interrupts


def random_base(config: LlamaConfig, placement: Placement, attention: Attention, shards: Ranks | None) -> Any:
    """A quantised base that never exists in 16 bits: each weight is drawn, quantised and dropped."""
    register()
    model: Any = empty_model(config)
    model.set_attn_implementation(attention.implementation)
    torch.manual_seed(0)  # the same on every GPU
    for layer in model.model.layers:
        draw(layer, placement)
        if shards:
            shard_layer(layer, shards)
    draw(model, placement)
    model.model.rotary_emb.to(placement.device)
    install_dequantising_products(model)
    if shards:
        join_layers(model, shards)
    model.config.use_cache = False
    return model


def draw(part: nn.Module, placement: Placement) -> None:
    """Give random values to all weights that have none: linear layers in 4 bits, others (the LM head too) in 16."""
    device, dtype = placement.device, placement.dtype
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.is_meta and name != "lm_head":
                setattr(module, name, quantised_linear(child, dtype, device))
    for name, parameter in list(part.named_parameters()):
        if parameter.is_meta:  # norms, embeddings, LM head
            made = torch.ones(parameter.shape, dtype=dtype, device=device)
            values = made if "norm" in name else made.normal_(std=0.02)
            owner, key = part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(owner, key, nn.Parameter(values, requires_grad=False))


def quantised_linear(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> bnb.nn.Linear4bit:
    """A 4-bit layer of the same size, NF4 with double quantisation."""
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = torch.randn(layer.out_features, layer.in_features, dtype=dtype, device=device) * 0.02
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    made.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=made)
    made.quant_state = state
    made.support_avx512bf16_for_cpu = False
    return made


def configuration(rows: int, offload: bool) -> RunConfig:
    """Of the run that is measured."""
    return RunConfig(
        model=ModelConfig(embeddings_on_host=True),
        lora=LoraConfig(r=16, lora_alpha=32),
        data=DataConfig(max_length=512),
        train=TrainConfig(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=rows,
            optim="paged_adamw_8bit",
            offload_activations=offload,
        ),
    )


def random_rows(rows: int) -> list[Any]:
    """Examples of 512 random tokens, all of which are learned."""
    drawn = np.random.default_rng(0).integers(3, 32000, (rows, 512))
    return [SimpleNamespace(row=row, input_ids=ids, labels=ids, weights=None) for row, ids in enumerate(drawn)]


def measure(
    shape: dict[str, Any], steps: int, cap_gib: float, offload: bool, rows: int, ranks: Ranks, shard: bool
) -> dict[str, Any]:
    """Train and say what it took."""
    limit_memory(cap_gib)
    placement, run = choose_placement("auto"), configuration(rows, offload)
    settings = LlamaConfig(**shape, vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=2048)
    cuda = placement.device.type == "cuda"
    attention = choose_attention(run.model, settings, placement) if cuda else Attention(NAMES["math"], "no GPU")
    base = random_base(settings, placement, attention, ranks if shard else None)
    states = quantised_states(base)
    parameters = sum(states[name].shape.numel() if name in states else p.numel() for name, p in base.named_parameters())
    move_embeddings_to_host(base)
    policy = build_policy(base, run.lora, placement, seed=0, attention=attention, offload=offload)
    optimizer = build_optimizer(policy.flat.weights, run.train)
    method = build_method(run, attention)
    inputs: Any = SimpleNamespace(placement=placement, attention=attention, shards=ranks if shard else None)
    execution = WithFallback(policy, method, choose_execution(run, inputs), lambda line: print(line, file=sys.stderr))
    execution.falls_back = not shard
    batches = method.micro_batches(random_rows(rows))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds, scale = [], [], LossScale.for_precision(placement.precision)
    for step in range(steps):
        began = time.perf_counter()
        result = optimizer_step(execution, optimizer, batches, scale, seed=0, step=step, max_grad_norm=1.0, ranks=ranks)
        synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(result.metrics["loss"])
    ranks.check_equal(steps, {"weights": [policy.flat.weights]})
    sizes = replace(
        model_shape(settings, AdapterSize(run.lora.r, run.lora.target_modules)), shards=ranks.size if shard else 1
    )
    return {
        "parameters": parameters,
        **shape,
        "offload": offload,
        "rows": rows,
        "ranks": ranks.size,
        "sharded": shard,
        "forecast_gb": round(forecast(sizes, run, default_plan(sizes, run), placement).peak / 1e9, 3),
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else "",
        "seconds_per_step": round(statistics.median(seconds[steps // 2 :]), 4),
        "execution": execution.mode,
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "cap_gib": cap_gib,
        **machine(),
        "commit": commit(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 6144), ("intermediate", 16384), ("layers", 50), ("heads", 48), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cap-gib", type=float, default=15e9 / 2**30, help="limit of the CUDA allocator")
    parser.add_argument("--offload", action=argparse.BooleanOptionalAction, default=True, help="layer inputs to host")
    parser.add_argument("--rows", type=int, default=1, help="rows a step")
    parser.add_argument("--shard", action="store_true", help="each GPU holds a part of every layer")
    options = parser.parse_args()
    shape = {
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
    }
    with joined({"300 s": 300.0}) as ranks, ranks.together(Interrupts(), lambda code, text: None):
        row = measure(shape, options.steps, options.cap_gib, options.offload, options.rows, ranks, options.shard)
    if not ranks.first:
        return
    writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)


if __name__ == "__main__":
    main()
