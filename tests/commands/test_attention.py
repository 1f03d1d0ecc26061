"""Which attention kernel a run gets, what it says about it, and that the choice does not change a step."""

import os

import helpers
import pytest
import torch
from transformers import FalconConfig, LlamaConfig

from lowlevel import determinism as workspaces
from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.errors import ConfigError
from lowlevel.model.attention_choice import Attention, choose_attention
from lowlevel.model.base import load_base
from lowlevel.model.build import build_policy
from lowlevel.model.placement import Placement, choose_placement


def on_a_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    """As if there was a GPU; only its capability is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setenv(workspaces.ENVIRONMENT, "for its old value to come back")
    monkeypatch.delenv(workspaces.ENVIRONMENT)


def choose(implementation: str = "auto", *, precision: str = "auto", head_dim: int = 64):
    base = LlamaConfig(hidden_size=8 * head_dim, num_attention_heads=8)
    return choose_attention(ModelConfig(attn_implementation=implementation), base, choose_placement(precision))


def test_on_a_cpu():
    chosen = choose()
    assert (chosen.implementation, chosen.kernel) == ("sdpa", None)
    assert chosen.reason == "sdpa with an explicit mask: the run is on a CPU"
    for kernel in ("flash", "efficient"):
        with pytest.raises(ConfigError, match=f'attn_implementation = "{kernel}" needs a GPU, and none is visible'):
            choose(kernel)


def test_on_a_t4(monkeypatch):
    on_a_gpu(monkeypatch, (7, 5))
    lacks = "FlashAttention 2 needs compute capability 8.0, this GPU has 7.5"
    assert choose() == Attention("lowlevel_efficient", f"spans, memory-efficient kernel: {lacks}")
    assert choose().kernel == "efficient"
    with pytest.raises(ConfigError, match=f'model.attn_implementation = "flash": {lacks}'):
        choose("flash")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_on_a_gpu_with_flash_attention(monkeypatch, capability, precision):
    on_a_gpu(monkeypatch, capability)
    where = "compute capability {}.{}".format(*capability)
    for asked in ("auto", "flash"):
        assert choose(asked, precision=precision) == Attention("lowlevel_fa2", f"spans, flash kernel ({where})")
    assert choose("efficient", precision=precision).kernel == "efficient"
    assert choose("efficient").reason == "spans, memory-efficient kernel: asked for"


@pytest.mark.parametrize(
    ("precision", "head_dim", "lacks"),
    [("fp32", 64, "has no fp32"), ("fp16", 512, "takes heads of up to 256 features, these have 512")],
)
def test_what_flash_lacks(monkeypatch, precision, head_dim, lacks):
    on_a_gpu(monkeypatch, (8, 0))
    chosen = choose(precision=precision, head_dim=head_dim)
    assert (chosen.kernel, chosen.reason) == ("efficient", f"spans, memory-efficient kernel: FlashAttention 2 {lacks}")


def test_an_architecture_whose_attention_cannot_be_replaced(monkeypatch):
    on_a_gpu(monkeypatch, (9, 0))
    base = FalconConfig(hidden_size=256, num_attention_heads=4)
    chosen = choose_attention(ModelConfig(), base, choose_placement("auto"))
    reason = "the code of this architecture (falcon) takes no other"
    assert chosen == Attention("sdpa", f"sdpa with an explicit mask: {reason}")
    with pytest.raises(ConfigError, match=r'"flash": .* \(falcon\) takes no other than eager and sdpa'):
        choose_attention(ModelConfig(attn_implementation="flash"), base, choose_placement("auto"))


def test_heads_that_no_kernel_takes(monkeypatch):
    on_a_gpu(monkeypatch, (9, 0))
    chosen = choose(head_dim=12)
    assert chosen == Attention("sdpa", "sdpa with an explicit mask: heads have 12 features, not a multiple of 8")


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0)])
@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_masked_attention_is_taken_at_its_word(monkeypatch, capability, asked):
    if capability:
        on_a_gpu(monkeypatch, capability)
    chosen = choose(asked)
    assert (chosen.implementation, chosen.kernel) == (asked, None)
    assert chosen.reason.endswith("model.attn_implementation asks for it")


def test_precisions_of_a_gpu(monkeypatch):
    on_a_gpu(monkeypatch, (7, 5))
    assert choose_placement("auto") == Placement(torch.device("cuda", 0), "fp16")
    assert choose_placement("auto").dtype == torch.float16
    assert choose_placement("fp32").precision == "fp32"
    with pytest.raises(ConfigError) as caught:
        choose_placement("bf16")
    assert str(caught.value) == 'bf16 needs compute capability 8.0; this GPU has 7.5: use precision = "fp16"'
    on_a_gpu(monkeypatch, (8, 0))
    assert choose_placement("bf16").dtype == torch.bfloat16


def test_a_gpu_whose_workspaces_are_large_gets_small_ones_unless_the_user_has_chosen(monkeypatch):
    monkeypatch.setenv(workspaces.ENVIRONMENT, "unset")
    monkeypatch.delenv(workspaces.ENVIRONMENT)
    on_a_gpu(monkeypatch, (7, 5))
    choose_placement("auto")
    assert workspaces.ENVIRONMENT not in os.environ
    on_a_gpu(monkeypatch, (9, 0))
    choose_placement("auto")
    assert os.environ[workspaces.ENVIRONMENT] == workspaces.SMALL
    monkeypatch.setenv(workspaces.ENVIRONMENT, ":16:8")
    choose_placement("auto")
    assert os.environ[workspaces.ENVIRONMENT] == ":16:8"


def test_precisions_of_a_cpu():
    assert choose_placement("auto") == Placement(torch.device("cpu"), "fp32")
    assert choose_placement("bf16").precision == "bf16"
    with pytest.raises(ConfigError, match='"fp16" needs a GPU, and none is visible: use --train.precision fp32'):
        choose_placement("fp16")


@pytest.mark.parametrize("kind", ["sft", "sft-packed", "dpo", "dpo-packed"])
def test_eager_and_sdpa_take_the_same_step(space, kind):
    examples = helpers.ragged_examples() if kind.startswith("sft") else helpers.ragged_pairs()
    method = getattr(helpers, kind[:3])(packing=kind.endswith("packed"))
    results = []
    for implementation in ("eager", "sdpa"):
        base = load_base(ModelConfig(name=str(space.base), load_in_4bit=False), helpers.CPU, attention=implementation)
        assert base.config._attn_implementation == implementation
        policy = build_policy(
            base,
            LoraConfig(r=4, lora_dropout=0.0),
            helpers.CPU,
            seed=0,
            gradient_checkpointing=False,
            attention=Attention(implementation, "for a test"),
        )
        helpers.fill_lora_b(policy)
        results.append(helpers.loss_and_gradient(policy, method, examples))
    (loss, gradient), (expected_loss, expected_gradient) = results
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    largest, mean = helpers.drifts(gradient, expected_gradient)
    assert largest < 5e-6  # rounding of fp32, in another order
    assert mean < 5e-6
