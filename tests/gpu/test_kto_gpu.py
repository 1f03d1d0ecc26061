"""Prompts with several completions in the attention kernels, and KTO's steps, which share them, in every mode."""

import helpers
import pytest
import torch

from lowlevel.batch.layout import Shape, build_batch
from lowlevel.batch.segments import prompt_segment
from lowlevel.config.offline import KTOConfig
from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.execution import Eager, WithFallback
from lowlevel.kernels.attention import list_keys, span_attention
from lowlevel.methods.kto import KTO
from lowlevel.model.attention_choice import Attention
from lowlevel.model.base import load_base
from lowlevel.model.build import build_policy
from lowlevel.model.placement import Placement
from lowlevel.optim.loss_scale import LossScale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")
SHAPE = Shape(positions=64, examples=8, longest=128, capacity=256)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_kernels_equal_their_twin_with_five_completions(kernel):
    torch.manual_seed(0)
    segments = []
    for row in range(3):
        ends = dict(enumerate(torch.randint(3, 99, (20,)).split([7, 1, 4, 6, 2]), 1))
        prompt = torch.randint(3, 99, (33,)).numpy()
        segments.append(prompt_segment(row, 5 * row, prompt, {branch: ids.numpy() for branch, ids in ends.items()}))
    batch = build_batch([segments], pairs=False, shape=SHAPE).to(CUDA)
    positions, results = batch.input_ids.numel(), []
    shapes = (positions, 4, 64), (positions, 2, 64), (positions, 2, 64)
    inputs = [torch.randn(shape, device=CUDA, dtype=torch.float16) for shape in shapes]
    direction = torch.randn(shapes[0], device=CUDA, dtype=torch.float16)
    for name, kind in ((kernel, torch.float16), ("math", torch.float64)):
        query, key, value = (part.to(kind).requires_grad_() for part in inputs)
        listed = [list_keys(part, batch.key_index, batch.key_uses) for part in (key, value)]
        output = span_attention(query, *listed, batch.span_queries, batch.span_keys, batch.longest, 0.125, name)
        results.append([output, *torch.autograd.grad(output, (query, key, value), direction.to(kind))])
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiled_and_graphed_steps_equal_eager_ones(tmp_path, use_dora):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
                                 num_attention_heads=8, num_key_value_heads=2)).save_pretrained(tmp_path)  # fmt: skip
    placement, attention = Placement(CUDA, "fp16"), Attention("lowlevel_efficient", "for a test")
    base = load_base(ModelConfig(name=str(tmp_path)), placement, attention=attention.implementation)
    lora = LoraConfig(r=16, lora_dropout=0.1, use_dora=use_dora)
    policy = build_policy(base, lora, placement, seed=0, attention=attention)
    with torch.no_grad():
        for name, view in policy.flat.views.items():
            if ".lora_B." in name:
                view.normal_(std=0.05)
    method = KTO(KTOConfig(disable_dropout=False), 2, 128, True, SHAPE)
    examples, found = helpers.labelled_examples(16), []
    for mode in ("eager", "compiled", "graphed"):
        execution = Eager(policy, method) if mode == "eager" else WithFallback(policy, method, mode, pytest.fail)
        for number in range(4):
            scale = LossScale.for_precision("fp16")
            result = helpers.step(policy, method, examples, execution=execution, scale=scale, number=number)
            found.append((mode, number, result.metrics, policy.flat.grad.clone()))
    for mode, number, metrics, gradient in found[4:]:
        _, _, expected, wanted = found[number]
        assert metrics["kl"] == pytest.approx(expected["kl"], rel=2e-2) and expected["kl"] != 0
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=2e-3), mode
        assert (gradient - wanted).norm() / wanted.norm() < 1e-2, mode
