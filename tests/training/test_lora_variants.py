"""Variants of LoRA: each against PEFT, compiled, resumed bit for bit, verified, merged."""

import bitsandbytes as bnb
import helpers
import pytest
import torch
from config_keys import refused
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.utils.loftq_utils import _low_rank_decomposition
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from workspace import make_workspace, run

from lowlevel.config.schema import LoraConfig, ModelConfig, TrainConfig
from lowlevel.execution import WithFallback
from lowlevel.model.adapters import adapter_start
from lowlevel.model.attention_choice import Attention
from lowlevel.model.base import base_sha256, load_base
from lowlevel.model.build import build_policy
from lowlevel.model.linear import Dora, product
from lowlevel.model.policy import TRAINED
from lowlevel.model.quantisation_error import low_rank, start_from_error
from lowlevel.optim.optimizer import build_optimizer, optimizer_tensors, set_learning_rate
from lowlevel.running.reopening import reopen


def made(base, **lora):
    """A fresh policy over the tiny base, with random B."""
    model = load_base(ModelConfig(name=str(base), load_in_4bit=False), helpers.CPU)
    policy = build_policy(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **lora), helpers.CPU, seed=0)
    helpers.fill_lora_b(policy)
    return policy


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_32bit"])
def test_two_learning_rates_on_the_flat_buffer_are_pefts_loraplus_optimizer(tiny_base, kind):
    config = TrainConfig(optim=kind, learning_rate=1e-3, weight_decay=0.1)
    ours, theirs = made(tiny_base, loraplus_lr_ratio=16.0), made(tiny_base)
    one = build_optimizer(ours.flat.weights, config, ours.flat.parts)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "loraplus_weight_decay": 0.1, "weight_decay": 0.1}
    other = create_loraplus_optimizer(theirs.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, **settings)
    start = ours.flat.weights.detach().clone()
    for number in range(4):
        rate = 1e-3 * (1 - number / 4)
        set_learning_rate(one, rate)
        for group, factor in zip(other.param_groups, (1, 0, 16, 16), strict=True):
            group["lr"] = rate * factor
        results = [
            helpers.step(policy, helpers.sft(packing=True), helpers.ragged_examples(), optimizer, max_grad_norm=1.0)
            for policy, optimizer in ((ours, one), (theirs, other))
        ]
        assert results[0].learning_rate == rate
    expected = torch.cat([theirs.flat.views[name].detach().flatten() for name in ours.flat.views])
    largest, mean = helpers.drifts(ours.flat.weights.detach(), expected)
    assert largest < 5e-6 and mean < 1e-6 < 1e-3 < (expected - start).abs().mean()
    kinds = [name.split(".")[-3] for name in ours.flat.views]
    assert kinds == sorted(kinds) and list(ours.flat.views) != list(theirs.flat.views)
    assert {name.split("::")[0] for name in optimizer_tensors(one)} == {"flat", "flat_B"}


def test_doras_product_and_gradient_are_those_of_its_definition():
    """In float64 from the dense W + B A, whose row lengths are constants to the gradient; a row of zeros stays 0."""
    generator = torch.Generator().manual_seed(0)
    weight, x, down, up, magnitude = (
        torch.randn(shape, generator=generator) for shape in ((6, 8), (5, 8), (3, 8), (6, 3), (6,))
    )
    weight[2], up[2], magnitude[2] = 0.0, 0.0, 0.0
    layer = torch.nn.Linear(8, 6)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    leaves = [part.requires_grad_() for part in (x, down, up, magnitude)]
    dora = Dora(magnitude, weight.square().sum(1), down.detach(), up.detach())
    found = product(layer, x, [x], [down], [up], dora)
    exact = [part.detach().double().requires_grad_() for part in leaves]
    dense = weight.double() + exact[2] @ exact[1]
    scale = exact[3] / dense.detach().norm(dim=1).clamp(min=1e-300)
    expected = exact[0] @ dense.T * scale + layer.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(found.shape, generator=generator)
    grads = torch.autograd.grad(found, leaves, direction), torch.autograd.grad(expected, exact, direction.double())
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_a_fresh_dora_policy_equals_its_reference_bit_for_bit(tiny_base):
    policy = made(tiny_base, use_dora=True)
    for name, view in policy.flat.views.items():
        view.data.zero_() if ".lora_B." in name else None
    (batch,) = helpers.sft(packing=True).micro_batches(helpers.ragged_examples())
    with policy.reference():
        reference = policy.token_logps(batch)
    assert torch.equal(policy.token_logps(batch), reference)
    assert {name.split(".")[-3] for name in policy.flat.views} == {"lora_A", "lora_B", "lora_magnitude_vector"}


def test_dora_on_a_frozen_adapter_is_refused():
    (line,) = refused({"method": "dpo", "lora": {"use_dora": True}, "model": {"adapter": "out/sft"}})
    assert "lora.use_dora cannot stand on model.adapter" in line


@pytest.mark.parametrize(("shape", "rank"), [((12, 40), 5), ((40, 12), 5), ((7, 9), 16), ((6, 6), 6)])
def test_the_low_rank_product_is_the_truncated_singular_value_decomposition(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[:, 0] = 0.0  # a matrix without full rank
    up, down = low_rank(matrix, rank)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert up.shape == (shape[0], min(rank, *shape)) and down.shape == (min(rank, *shape), shape[1])
    torch.testing.assert_close(up @ down, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=0, atol=1e-9)
    assert float(up.norm()) == pytest.approx(float(down.norm()), rel=1e-6), "each has half of the size"


def test_loftq_is_pefts_and_the_base_keeps_its_bytes(tiny_base):
    """PEFT's function for a quantised model, which needs a GPU, ends in `_low_rank_decomposition`."""
    model_config = ModelConfig(name=str(tiny_base))
    lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, use_rslora=True)
    policy = build_policy(load_base(model_config, helpers.CPU), lora, helpers.CPU, seed=0)
    before = base_sha256(policy.model)
    (batch,) = helpers.sft(packing=True).micro_batches(helpers.ragged_examples())
    exact = load_base(model_config.model_copy(update={"load_in_4bit": False}), helpers.CPU)
    quantised = policy.scored_hidden_states(batch)
    start_from_error(policy, model_config)
    assert base_sha256(policy.model) == before
    for layer, (name, weight) in zip(policy.lora_layers, _linear(exact), strict=True):
        dense = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
        expected = _low_rank_decomposition(weight - dense, 4)
        update = layer.scaling[TRAINED] * layer.lora_B[TRAINED].weight @ layer.lora_A[TRAINED].weight
        error = (update - expected["L"] @ expected["R"]).norm() / expected["L"].norm()
        assert error < 1e-4, name
        assert (weight - dense - update).norm() < 0.95 * (weight - dense).norm()
    wanted = made(tiny_base, target_modules=("q_proj",))  # at B = 0 the 16-bit base
    for name, view in wanted.flat.views.items():
        view.data.zero_() if ".lora_B." in name else None
    truth = wanted.scored_hidden_states(batch)
    errors = [(hidden - truth).norm() for hidden in (policy.scored_hidden_states(batch), quantised)]
    assert errors[0] < 0.95 * errors[1], "closer to the base before quantisation"


def _linear(model):
    """Name and weight of the adapted layers, in their order."""
    return [(n, m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


VARIANTS = {
    "rslora, loraplus": {"use_rslora": True, "loraplus_lr_ratio": 4.0},
    "loftq": {"init_lora_weights": "loftq"},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("variants"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_is_loaded_by_peft_verified_continued_and_merged(space, tmp_path, name):
    settings = {"lora": {**VARIANTS[name], "lora_dropout": 0.0}, "train": {"save_steps": 3, "optim": "adamw"}}
    said = run("sft", space.write(name, "sft", folder=tmp_path, **settings))
    assert said.code == 0, said.err
    folder = tmp_path / name
    opened = reopen(folder)
    own, ids = opened.policy(folder / "adapter"), torch.arange(3, 40)[None]
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = AutoModelForCausalLM.from_pretrained(space.base, dtype=torch.float32, quantization_config=quantisation)
    for module in plain.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # as lowlevel.model.base says
    peft = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(own.model(input_ids=ids).logits, peft(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert run("verify", folder).code == 0
    assert run("verify", tmp_path / f"{name}.toml").code == 0
    assert run("replay", folder, "--step", 6, "--from", 3).code == 0, "every update again, from the saved state"
    assert run("merge", folder, "--out", tmp_path / "merged").code == 0
    said = run("merge", folder, "--into", "original", "--out", tmp_path / "original")
    assert (said.code, "so it does not belong to the 16-bit weights" in said.err) == ((2, True) if name == "loftq" else
                                                                                       (0, False))  # fmt: skip
    if name == "loftq":
        more = {"model": {"adapter": str(folder), "adapter_mode": "original"}}
        said = run("dpo", space.write("next", "dpo", folder=tmp_path, **more))
        assert said.code == 2 and "so it does not belong to the 16-bit weights" in said.err
        more = {"lora": {"init_from": str(folder), "r": None, "lora_alpha": None}, "train": {"max_steps": 1}}
        assert run("sft", space.write("more", "sft", folder=tmp_path, **more)).code == 0
        assert adapter_start(tmp_path / "more" / "adapter") == "loftq"
        assert adapter_start(folder / "step-00000003") == "loftq"
    if name == "dora":
        more = {"model": {"adapter": str(folder)}, "train": {"max_steps": 1}}
        said = run("dpo", space.write("next", "dpo", folder=tmp_path, **more))
        assert said.code == 2 and "an adapter with use_dora is not stacked: " in said.err
        more["model"]["adapter_mode"] = "original"
        assert run("dpo", space.write("next", "dpo", folder=tmp_path, **more)).code == 0
        more = {"lora": {"init_from": str(folder), "r": None, "lora_alpha": None}, "train": {"max_steps": 1}}
        assert run("sft", space.write("more", "sft", folder=tmp_path, **more)).code == 0
        assert reopen(tmp_path / "more").policy(tmp_path / "more" / "adapter").lora_layers[0].lora_magnitude_vector


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_layers_give_the_same_gradient(tiny_base, name):
    base = load_base(ModelConfig(name=str(tiny_base)), helpers.CPU, attention="lowlevel_math")
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **VARIANTS[name])
    attention = Attention("lowlevel_math", "for a test")
    policy = build_policy(base, lora, helpers.CPU, seed=0, gradient_checkpointing=False, attention=attention)
    if name == "loftq":
        start_from_error(policy, ModelConfig(name=str(tiny_base)))
    else:
        helpers.fill_lora_b(policy)
    method = helpers.sft(packing=True)
    loss, gradient = helpers.loss_and_gradient(policy, method, helpers.ragged_examples())
    torch._dynamo.reset()
    execution = WithFallback(policy, method, "compiled", pytest.fail)
    found, other = helpers.loss_and_gradient(policy, method, helpers.ragged_examples(), execution=execution)
    assert found == pytest.approx(loss, rel=1e-5) and (other - gradient).norm() < 1e-5 * gradient.norm()


def test_loftq_needs_the_weights_before_quantisation(space, tmp_path):
    config = ModelConfig(name=str(space.base))
    load_base(config, helpers.CPU).save_pretrained(tmp_path / "stored")
    for file in space.base.glob("token*"):
        (tmp_path / "stored" / file.name).write_bytes(file.read_bytes())
    sections = {"model": {"name": str(tmp_path / "stored")}, "lora": {"init_lora_weights": "loftq"}}
    said = run("sft", space.write("run", "sft", folder=tmp_path, **sections))
    assert said.code == 2 and "needs the base's 16-bit weights, and" in said.err and "holds only 4-bit ones" in said.err
