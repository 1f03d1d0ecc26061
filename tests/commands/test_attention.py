"""Which attention kernel a run gets, what it says about it, and that the choice does not change a step."""

import helpers
import pytest
import torch

from lowlevel.assembly import choose_attention
from lowlevel.config import DataConfig, LoraConfig, ModelConfig, RunConfig
from lowlevel.errors import ConfigError
from lowlevel.model.adapters import build_policy
from lowlevel.model.base import Placement, choose_placement, load_base


def on_a_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    """As if there was a GPU; only its capability is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


def choose(implementation: str = "auto", *, packing: bool = True, precision: str = "auto"):
    config = RunConfig(model=ModelConfig(attn_implementation=implementation), data=DataConfig(packing=packing))
    return choose_attention(config, choose_placement(precision))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "sdpa"])
def test_on_a_cpu(implementation, packing):
    chosen = choose(implementation, packing=packing)
    assert (chosen.implementation, chosen.causal_kernel) == ("sdpa", False)
    assert chosen.reason == "sdpa with an explicit mask: the run is on a CPU"


@pytest.mark.parametrize("packing", [True, False])
def test_on_a_t4(monkeypatch, packing):
    on_a_gpu(monkeypatch, (7, 5))
    chosen = choose(packing=packing)
    assert (chosen.implementation, chosen.causal_kernel) == ("sdpa", False)
    assert chosen.reason == (
        "sdpa, memory-efficient kernel: FlashAttention 2 needs compute capability 8.0, this GPU has 7.5"
    )


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_on_a_gpu_with_flash_attention(monkeypatch, capability, precision):
    on_a_gpu(monkeypatch, capability)
    where = "compute capability {}.{}".format(*capability)
    plain, packed = (choose(packing=packing, precision=precision) for packing in (False, True))
    assert (plain.implementation, plain.causal_kernel) == ("sdpa", True)
    assert plain.reason == f"sdpa, flash kernel ({where}): one sequence a row, causal"
    assert (packed.implementation, packed.causal_kernel) == ("sdpa", False)
    assert packed.reason == f"sdpa, memory-efficient kernel ({where}): packed rows need a mask, which flash has not"


def test_flash_has_no_fp32(monkeypatch):
    on_a_gpu(monkeypatch, (8, 0))
    chosen = choose(packing=False, precision="fp32")
    assert (chosen.causal_kernel, chosen.reason) == (
        False,
        "sdpa, memory-efficient kernel: the flash kernel has no fp32",
    )


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0)])
def test_eager_is_taken_at_its_word(monkeypatch, capability):
    if capability:
        on_a_gpu(monkeypatch, capability)
    chosen = choose("eager", packing=False)
    assert (chosen.implementation, chosen.causal_kernel) == ("eager", False)
    assert chosen.reason == "eager attention: model.attn_implementation asks for it"


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
            base, LoraConfig(r=4, lora_dropout=0.0), helpers.CPU, seed=0, gradient_checkpointing=False
        )
        helpers.fill_lora_b(policy)
        results.append(helpers.loss_and_gradient(policy, method, examples))
    (loss, gradient), (expected_loss, expected_gradient) = results
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    largest, mean = helpers.drifts(gradient, expected_gradient)
    assert largest < 5e-6  # rounding of fp32, in another order
    assert mean < 5e-6
