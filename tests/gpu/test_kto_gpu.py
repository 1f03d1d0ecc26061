"""Prompts with several completions in the attention kernels, and KTO's steps, which share them, in every mode."""

import helpers
import pytest
import torch
from small import CUDA, attention_errors, fill_lora_b, small_policy, steps_in_every_mode

from lowlevel.batch.layout import Shape, build_batch
from lowlevel.batch.segments import prompt_segment
from lowlevel.config.offline import KTOConfig
from lowlevel.methods.kto import KTO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
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
    assert max(attention_errors(batch, 2, kernel, torch.float16)) < 4e-3


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiled_and_graphed_steps_equal_eager_ones(model_dir, use_dora):
    policy = small_policy(model_dir, lora={"use_dora": use_dora})
    fill_lora_b(policy, 0.05)
    method = KTO(KTOConfig(disable_dropout=False), 2, 128, True, SHAPE)
    for mode, metrics, expected, error in steps_in_every_mode(policy, method, helpers.labelled_examples(16)):
        assert metrics["kl"] == pytest.approx(expected["kl"], rel=2e-2) and expected["kl"] != 0
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=2e-3), mode
        assert error < 1e-2, mode
