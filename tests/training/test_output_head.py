"""Every loss takes logits to be hidden @ lm_head.T: a model for which that is not so must never be trained silently."""

import json
import shutil
from contextlib import nullcontext

import helpers
import pytest
import torch
from torch import nn

from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.errors import ConfigError
from lowlevel.model.base import load_base, load_model_config
from lowlevel.model.build import build_policy


@pytest.mark.parametrize("change", [lambda logits: 2 * logits, lambda logits: 3 * torch.tanh(logits / 3)])
def test_a_model_that_changes_its_logits_is_refused(tiny_base, change):
    base = load_base(ModelConfig(name=str(tiny_base), load_in_4bit=False), helpers.CPU)
    base.get_output_embeddings().weight.mul_(20)  # large enough for the cap to bite
    base.get_output_embeddings().register_forward_hook(lambda module, args, logits: change(logits))
    with pytest.raises(ConfigError, match=r"logits are not hidden @ lm_head.T \(largest difference"):
        build_policy(base, LoraConfig(r=4), helpers.CPU, seed=0)


@pytest.mark.parametrize("size", [3e-2, 1e-3])
def test_a_shift_of_the_logits_far_below_one_per_cent_is_refused(tiny_base, size):
    """The largest logit is some 30."""
    base = load_base(ModelConfig(name=str(tiny_base), load_in_4bit=False), helpers.CPU)
    base.get_output_embeddings().weight.mul_(20)
    shift = size * torch.randn(helpers.VOCABULARY, generator=torch.Generator().manual_seed(0)).sign()
    base.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + shift)
    with pytest.raises(ConfigError, match=r"logits are not hidden @ lm_head.T \(largest difference"):
        build_policy(base, LoraConfig(r=4), helpers.CPU, seed=0)


@pytest.mark.parametrize(("size", "refused"), [(1e-6, True), (0.0, False)])
def test_a_bias_of_the_lm_head_is_refused_where_it_is_not_zero(tiny_base, size, refused):
    """Phi-1, Phi-2 and GPT-J have one."""
    base = load_base(ModelConfig(name=str(tiny_base), load_in_4bit=False), helpers.CPU)
    base.get_output_embeddings().bias = nn.Parameter(torch.full((helpers.VOCABULARY,), size), requires_grad=False)
    expected = pytest.raises(ConfigError, match=r"the LM head has a bias \(largest value 1e-06\)")
    with expected if refused else nullcontext():
        build_policy(base, LoraConfig(r=4), helpers.CPU, seed=0)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_configuration_that_says_so_is_refused_before_loading(tiny_base, tmp_path, key):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    for value, refused in ((30.0, True), (1.0, False), (None, False)):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        if refused:
            with pytest.raises(ConfigError, match=f"rescales its logits \\({key}\\)"):
                load_model_config(ModelConfig(name=str(folder)))
        else:
            load_model_config(ModelConfig(name=str(folder)))


def test_cudnn_attention_is_off_after_building(tiny_base):
    torch.backends.cuda.enable_cudnn_sdp(True)
    base = load_base(ModelConfig(name=str(tiny_base), load_in_4bit=False), helpers.CPU)
    build_policy(base, LoraConfig(r=4), helpers.CPU, seed=0)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
