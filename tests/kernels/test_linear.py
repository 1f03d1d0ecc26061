"""Adapted layers as they are compiled against PEFT's own, in output and every gradient."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lowlevel.kernels.dequantize import Quantised
from lowlevel.model.build import place_dropout
from lowlevel.model.dropout import DropoutState
from lowlevel.model.linear import adapted_linear, install_dequantising_products, install_side_by_side
from lowlevel.model.policy import PARENT, TRAINED

INPUTS, OUTPUTS = 128, 40
CPU = torch.device("cpu")
bases = pytest.mark.parametrize("base", ["nf4", "fp32"])


class Model(nn.Module):
    def __init__(self, quantised: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        if quantised:
            layer = bnb.nn.Linear4bit(INPUTS, OUTPUTS, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            self.proj = layer.to("cpu")
            self.proj.support_avx512bf16_for_cpu = False
        else:
            self.proj = nn.Linear(INPUTS, OUTPUTS, bias=bias)

    def forward(self, x):
        return self.proj(x)


def adapted(quantised: bool, *, bias: bool = False, stacked: bool = False, dropout: float = 0.0):
    """A layer with a trained adapter, under it perhaps a frozen one of another rank and scale; both have an effect."""
    base = Model(quantised, bias).requires_grad_(False)
    install_dequantising_products(base)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=["proj"]), adapter_name=TRAINED)
    if stacked:
        model.add_adapter(PARENT, LoraConfig(r=3, lora_alpha=7, target_modules=["proj"]))
    install_side_by_side(model)
    layer, state = base.proj, DropoutState()
    place_dropout({"proj": layer}, dropout, state, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in (layer.lora_A, layer.lora_B):
            for one in weights.values():
                one.weight.normal_(std=0.1, generator=generator)
    layer.set_adapter([PARENT] * stacked + [TRAINED], inference_mode=True)
    trained = [layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight]
    for weight in trained:
        weight.requires_grad_(True)
    return model, layer, state, trained


def outcome(call, x, trained):
    out = call(x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, *trained], direction)]


@bases
@pytest.mark.parametrize(
    ("bias", "stacked", "dropout"), [(False, False, 0.0), (True, False, 0.3), (False, True, 0.3), (True, True, 0.0)]
)
def test_the_compiled_layer_equals_pefts_own(base, bias, stacked, dropout):
    model, layer, state, trained = adapted(base == "nf4", bias=bias, stacked=stacked, dropout=dropout)
    assert type(layer).__mro__[2].__module__.startswith("peft.tuners.lora")
    x = torch.randn(2, 7, INPUTS, generator=torch.Generator().manual_seed(3), requires_grad=True)
    state.set_micro_batch(torch.arange(14, dtype=torch.int32).view(2, 7), 5)
    expected = outcome(model, x, trained)
    calls = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: calls.append(str(graph.code)) or graph)
    found = outcome(compiled, x, trained)
    assert "lowlevel.adapted_linear" in calls[0]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    torch._dynamo.reset()


@bases
def test_fp16_under_autocast_rounds_no_more_than_pefts_own(base):
    """Against the same weights in float64: the compiled layer's errors are no larger than twice those of PEFT's."""
    model, layer, state, trained = adapted(base == "nf4", stacked=True)
    values = torch.randn(2, 7, INPUTS, generator=torch.Generator().manual_seed(3))
    scale = 64.0
    direction = torch.randn(2, 7, OUTPUTS, generator=torch.Generator().manual_seed(2))

    def run(call):
        x = values.half().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            out = call(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *trained], (direction * scale).to(out.dtype))]

    if base == "nf4":
        layer.base_layer.compute_dtype = torch.float16
        state4 = layer.base_layer.weight.quant_state
        weight = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, state4)
    else:
        layer.base_layer.to(torch.float16)
        weight = layer.base_layer.weight
    x64 = values.half().double().requires_grad_()
    parts = [(layer.lora_A[n].weight.double(), layer.lora_B[n].weight.double(), layer.scaling[n])
             for n in (PARENT, TRAINED)]  # fmt: skip
    exact = x64 @ weight.double().T + sum(s * (x64 @ a.T) @ b.T for a, b, s in parts)
    right = [exact.detach(), *torch.autograd.grad(exact, [x64, *trained], (direction * scale).half().double())]

    def errors(found):
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]

    own = errors(run(model))
    compiled = errors(run(torch.compile(model, fullgraph=True, backend="eager")))
    torch._dynamo.reset()
    for ours, pefts in zip(compiled, own, strict=True):
        assert ours < 2e-3 and ours < 2 * pefts


@bases
@pytest.mark.parametrize("way", ["disabled", "merged"])
def test_pefts_own_switches_are_obeyed(base, way):
    """Compiled as uncompiled: an adapter that is switched off, or already in the weights, is not added."""
    model, layer, _, _ = adapted(base == "nf4")
    x = torch.randn(2, 7, INPUTS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        added = compiled(x)
        if way == "disabled":
            layer._disable_adapters = True
        else:
            layer.merged_adapters.append(TRAINED)  # as `merge` notes; the weights stay, so the adapter is missing
        assert torch.equal(compiled(x), layer.base_layer(x)) and not torch.allclose(added, compiled(x))
    torch._dynamo.reset()


@bases
def test_a_fresh_adapter_changes_no_bit(base):
    """B = 0 over a frozen adapter: the policy equals its reference."""
    model, layer, _, trained = adapted(base == "nf4", stacked=True)
    x = torch.randn(2, 7, INPUTS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        trained[1].zero_()
        policy = compiled(x)
        layer.set_adapter([PARENT], inference_mode=True)
        assert torch.equal(policy, compiled(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("nested", [None, False, True])
@pytest.mark.parametrize("adapters", [0, 1, 2])
def test_the_operator_obeys_torchs_rules(adapters, nested):
    """`nested` None: a weight that is not quantised. The second adapter is frozen."""
    torch.manual_seed(0)
    dense = torch.randn(16, 64)
    weight, sizes = [dense], [16, 64]
    if nested is not None:
        packed, state = bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=nested)
        quantised = Quantised.of(packed, state)
        weight, sizes = quantised.pack()
        assert Quantised.unpack(weight, sizes) == quantised and len(weight) == (6 if nested else 3)
        dense = bnb.functional.dequantize_4bit(packed, state)
    x = torch.randn(2, 3, 64, requires_grad=True)
    dropped = [torch.randn(2, 3, 64, requires_grad=True) for _ in range(adapters)]
    down = [torch.randn(2 + k, 64, requires_grad=k == 0) for k in range(adapters)]
    up = [torch.randn(16, 2 + k, requires_grad=k == 0) for k in range(adapters)]
    arguments = (x, dropped, down, up, weight, sizes, adapters > 0)
    torch.library.opcheck(torch.ops.lowlevel.adapted_linear.default, arguments)
    found, *inner = adapted_linear(*arguments)
    if adapters:
        torch.testing.assert_close(inner.pop(), down[-1] @ dense.T)
    expected = x @ dense.T + sum(one @ a.T @ b.T for one, a, b in zip(dropped, down, up, strict=True))
    torch.testing.assert_close(found, expected)
    assert [h.shape[-1] for h in inner] == [2, 3][:adapters] and not any(h.requires_grad for h in inner)
    leaves = [x, *dropped, *down[:1], *up[:1]]
    direction = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, leaves, direction)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, direction), wanted)
