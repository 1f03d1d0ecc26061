"""Full fine-tuning: against plain transformers, with its reference, resumed bit for bit, loaded back."""

import math
import shutil

import helpers
import pytest
import torch
from config_keys import refused
from families import SIZES, write_family
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig
from workspace import make_workspace, metrics, run

from lowlevel.batch.layout import Shape
from lowlevel.config.file import config_from_tables
from lowlevel.config.offline import DPOConfig, SFTConfig
from lowlevel.config.schema import ModelConfig
from lowlevel.errors import ConfigError
from lowlevel.execution import WithFallback
from lowlevel.labels import IGNORED
from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT
from lowlevel.model.adapters import WEIGHTS, WHOLE, weights_file
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.model.base import load_base
from lowlevel.model.build import build_full_policy
from lowlevel.model.memory import best_plan, model_shape
from lowlevel.model.placement import Placement
from lowlevel.running.reopening import reopen

BF16 = Placement(torch.device("cpu"), "bf16")
SHAPE = Shape(16, 4, 64, 96)


def full_policy(folder, placement=helpers.CPU, attention="sdpa"):
    base = load_base(ModelConfig(name=str(folder), load_in_4bit=False), placement, attention=attention)
    return build_full_policy(base, placement, attention=Attention(attention, ""))


@pytest.fixture(scope="module", params=["untied", "tied", "qwen3", "opt"])
def base(request, tmp_path_factory):
    """Qwen 3 normalises queries and keys; OPT adds position embeddings, and has biases."""
    folder, kind = tmp_path_factory.mktemp("bases"), request.param
    helpers.write_tiny_base(folder / "tiny", tie_word_embeddings=kind == "tied")
    if kind in ("untied", "tied"):
        return folder / "tiny"
    own = {"head_dim": 16} if kind == "qwen3" else {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}
    return write_family(folder / kind, kind, {**SIZES, **own}, folder / "tiny")


def test_a_steps_gradient_is_that_of_plain_transformers(base):
    """The mean cross-entropy of all supervised tokens, one example at a time, by autograd through the whole model."""
    examples, policy = helpers.ragged_examples(), full_policy(base)
    loss, gradient = helpers.loss_and_gradient(policy, helpers.sft(packing=True), examples)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    losses, count = [], 0
    for example in examples:
        ids, labels = (torch.from_numpy(part).long()[None] for part in (example.input_ids, example.labels))
        logits = model(ids).logits[0, :-1]
        losses.append(cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum"))
        count += int((labels[0, 1:] != IGNORED).sum())
    expected = torch.stack(losses).sum() / count
    expected.backward()
    plain = torch.cat([dict(model.named_parameters())[name].grad.flatten() for name in policy.flat.views])
    assert gradient.numel() == sum(p.numel() for p in model.parameters())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    largest, mean = helpers.drifts(gradient, plain)
    assert largest < 1e-5 and mean < 1e-5


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_do_not_change_the_gradient(base, rows):
    policy, examples = full_policy(base), helpers.ragged_pairs()
    whole = helpers.loss_and_gradient(policy, helpers.dpo(8), examples)
    parts = helpers.loss_and_gradient(policy, helpers.dpo(rows), examples)
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    assert helpers.drifts(parts[1], whole[1])[0] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "placement", "bound"), [(False, helpers.CPU, 1e-5), (True, BF16, 2e-2)])
def test_compiled_layers_give_the_same_gradient_also_to_the_embedding(tiny_base, pairs, placement, bound):
    """bf16: there the reference is of another dtype than the masters."""
    method = DPO(DPOConfig(), 2, 48, True, SHAPE) if pairs else SFT(SFTConfig(), 2, 48, True, SHAPE)
    examples = helpers.ragged_pairs() if pairs else helpers.ragged_examples()
    policy = full_policy(tiny_base, placement, attention=NAMES["math"])
    expected = helpers.loss_and_gradient(policy, method, examples)[1]
    execution = WithFallback(policy, method, "compiled", pytest.fail)
    helpers.step(policy, method, examples, execution=execution)
    assert policy.layers.compiled and policy.flat.views["model.embed_tokens.weight"].grad.any()
    assert (policy.flat.grad - expected).norm() < bound * expected.norm()


def test_masters_are_fp32_and_the_reference_keeps_the_bits_of_the_base(base):
    policy = full_policy(base, BF16)
    (batch,) = helpers.dpo(8).micro_batches(helpers.ragged_pairs())

    def reference():
        with policy.reference():
            return policy.token_logps(batch)

    before = reference()
    assert torch.equal(policy.token_logps(batch), before)
    start = policy.flat.weights.detach().clone()
    with torch.no_grad():
        policy.flat.weights.mul_(1 + 1e-4)  # less than bf16 can hold: it must add up
    assert not torch.equal(policy.flat.weights, start) and policy.flat.weights.dtype == torch.float32
    with torch.no_grad():
        policy.flat.weights.mul_(1.5)
    assert not torch.equal(policy.token_logps(batch), before) and torch.equal(reference(), before)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """An SFT run, and DPO from its model."""
    space = make_workspace(tmp_path_factory.mktemp("full"))
    lora = dict.fromkeys(("r", "lora_alpha", "lora_dropout"))
    train = {"finetuning_type": "full", "learning_rate": 1e-3, "save_steps": 3, "logging_steps": 1}
    for method, base in (("sft", space.base), ("dpo", space.folder / "sft" / "model")):
        kind = {} if method == "sft" else {"optim": "paged_adamw_8bit"}
        file = space.write(method, method, lora=lora, model={"name": str(base)}, train={**train, **kind})
        said = run(method, file)
        assert said.code == 0, said.err
    return space


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_is_resumed_bit_for_bit_and_loaded_by_plain_transformers(space, tmp_path, method):
    whole, folder = space.folder / method, space.copy(method, tmp_path)
    for name in ("step-00000006", "model"):
        shutil.rmtree(folder / name)
    file = folder / "config.toml"
    file.write_text(file.read_text().replace(str(whole), str(folder)))
    said = run(method, file, "--resume")
    assert said.code == 0, said.err
    losses = [[record["loss"] for record in metrics(path) if "loss" in record] for path in (whole, folder)]
    assert losses[0] == losses[1] and (method == "sft" or losses[0][0] == pytest.approx(math.log(2), abs=1e-6))
    for name in ("model/model.safetensors", "step-00000006/model.safetensors", "step-00000006/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes(), name
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    ids = torch.arange(3, 40)[None]
    own = reopen(folder).policy(folder / "model").causal_lm
    assert not any(info.values()) and model.dtype == torch.float32 and model.config.use_cache
    assert torch.equal(model(ids).logits, own(ids, use_cache=False).logits)


@pytest.mark.parametrize("command", [["replay", "--step", 6], ["inspect", "--step", 2], ["verify"]], ids=lambda c: c[0])
def test_the_commands_that_check_numbers(space, command):
    said = run(command[0], space.folder / "dpo", *command[1:])
    assert said.code == 0, said.out + said.err


def test_the_commands_that_do_not_apply_say_so_in_one_line(space, tmp_path):
    sft = space.folder / "sft"
    merge = run("merge", sft, "--out", tmp_path / "merged")
    adapter = run("dpo", space.write("x", "dpo", folder=tmp_path, model={"adapter": str(sft)}))
    base = run("dpo", space.write("y", "dpo", folder=tmp_path, model={"name": str(sft)}))
    for said, what in ((merge, "nothing to merge"), (adapter, "trained all weights"), (base, "its model is")):
        (line,) = [line for line in said.err.splitlines() if line.startswith("error")]
        assert said.code == 2 and what in line and str(sft / "model") in line


def test_an_adapter_beside_its_base_is_the_adapter(tmp_path):
    for name, expected in ((WHOLE, WHOLE), (WEIGHTS, WEIGHTS)):
        (tmp_path / name).touch()
        assert weights_file(tmp_path) == expected


FULL = {"train": {"finetuning_type": "full"}}


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"model": {"load_in_4bit": True}}, "4-bit weights cannot be trained"),
        ({"lora": {"r": 8}}, "lora.r is not used"),
        ({"method": "reward"}, "is for sft, dpo and kto"),
        ({"method": "dpo", "model": {"adapter": "out/sft"}}, "not model.adapter"),
        ({"method": "dpo", "dpo": {"ref_model_sync_steps": 4}}, "no ref_model_sync_steps"),
        ({"model": {"embeddings_on_host": True}}, "leave out model.embeddings_on_host"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_full_fine_tuning_refuses(tables, line):
    (found,) = refused({**FULL, **tables})
    assert line in found


@pytest.mark.parametrize(("method", "rate"), [("sft", 2e-5), ("dpo", 1e-6), ("kto", 1e-6)])
def test_its_defaults(method, rate):
    config = config_from_tables({"method": method, **FULL}, "here")
    assert not config.model.load_in_4bit and config.train.learning_rate == rate and config.active_dropout == 0
    own = config_from_tables({"method": method, "train": {"finetuning_type": "full", "learning_rate": 0.5}}, "here")
    assert own.train.learning_rate == 0.5


@pytest.mark.parametrize(("optim", "bytes_each"), [("paged_adamw_32bit", 16), ("paged_adamw_8bit", 10)])
def test_a_budget_that_the_state_exceeds_is_refused_with_the_numbers(optim, bytes_each):
    """TinyLlama has 1,100,048,384 weights; each takes fp32 weight and gradient, and 8 or 2 bytes of Adam's state."""
    config = config_from_tables({"train": {"finetuning_type": "full", "optim": optim}}, "here")
    shape, placement = model_shape(LlamaConfig(**TINYLLAMA), None), Placement(torch.device("cuda"), "fp16")
    with pytest.raises(ConfigError) as caught:
        best_plan(shape, config, placement, 9 * 2**30)
    state = bytes_each * 1_100_048_384 / 2**30
    assert f"{state:.2f} GiB of it" in str(caught.value) and "1,100,048,384 trained weights" in str(caught.value)
    assert best_plan(shape, config, placement, int((state + 3) * 2**30)).positions > 0


TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
