"""Sampling on a GPU: captured steps against eager ones and the trainer, and the attention kernel against its twin."""

from __future__ import annotations

import traceback

import numpy as np
import pytest
import torch
from small import CUDA, fill_lora_b, small_model, small_policy

from lowlevel.batch.layout import build_batch
from lowlevel.batch.segments import sft_segment
from lowlevel.kernels.decoding import attend_reference, decode_attention
from lowlevel.sampling import FastSampler, PlainSampler, Sampling, fast
from lowlevel.sampling.cached_model import misfit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def shared_beginnings(monkeypatch):
    monkeypatch.setattr(fast, "SHARING", ("cpu", "cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "features"), [(32, 4, 64), (14, 2, 64), (8, 8, 80), (4, 1, 256)])
def test_decode_attention_equals_its_twin(heads, kv_heads, features, dtype):
    generator = torch.Generator(CUDA).manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, device=CUDA).to(dtype)

    caches = [random(2, 6, kv_heads, 384, features)]
    caches.append(caches[0].clone())
    query, key, value = random(5, heads, features), random(5, kv_heads, features), random(5, kv_heads, features)
    positions = torch.tensor([0, 127, 128, 300, 383], device=CUDA)
    found = decode_attention(query, key, value, caches[0], positions, features**-0.5)
    parts, lse = attend_reference(query, key, value, caches[1], positions, features**-0.5)
    expected = (parts * lse.softmax(-1)[..., None]).sum(2)
    assert torch.equal(caches[0], caches[1])
    torch.testing.assert_close(found.float(), expected, atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"), initializer_range=0.06)


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def policy(request, model_dir):
    policy = small_policy(model_dir, request.param)
    fill_lora_b(policy, 0.02)
    return policy


def prompts(number=20, shots=0):
    """After `shots` tokens that are the same in all: a beginning that is read once."""
    rng = np.random.default_rng(1)
    return [[*range(9, 9 + shots), *rng.integers(3, 1000, rng.integers(1, 90)).tolist()] for _ in range(number)]


def trained_logps(policy, prompt, ids):
    whole = np.concatenate([prompt, ids])
    labels = np.where(np.arange(len(whole)) < len(prompt), -100, whole)
    batch = build_batch([[sft_segment(0, 0, whole, labels)]], pairs=False).to(CUDA)
    policy.dropout.disable()
    with torch.no_grad():
        return policy.token_logps(batch).cpu().numpy()


@pytest.mark.parametrize(("stage", "shots"), [("policy", 0), ("reference", 0), ("policy", 300)])
def test_log_probabilities_are_the_trainers_after_updates_without_a_new_capture(policy, stage, shots):
    assert misfit(policy.causal_lm, policy.placement) is None
    notes = []
    sampler = FastSampler(policy.model, policy.placement, [7], notes.append, slots=16)
    bound = 2e-2 if policy.placement.precision == "fp16" else 1e-4
    policy.activate(parent=True, trained=stage == "policy")
    captured, own = [], prompts(shots=shots)
    for seed in (0, 0, 1, 2):  # the first two capture
        fill_lora_b(policy, 0.02, seed)
        for prompt, (one,) in zip(own, sampler.sample(own, Sampling(40, 1.0, seed)), strict=True):
            apart = np.abs(one.logps - trained_logps(policy, prompt, one.ids)).max()
            assert apart < bound, f"{apart:.1e}"
        captured.append({id(graph) for graph, _ in sampler.steps._graphs.values()})
    policy.activate(parent=True, trained=True)
    why = sampler.steps.failure
    assert why is None and not notes, "".join(traceback.format_exception(why) if why else notes)
    assert captured[1] and captured[1] <= captured[3]  # none is captured again


def test_modes_and_hugging_face_agree(policy):
    """Greedy tokens: where two differ first, they are as likely to the trainer, so that a rounding decided."""
    own = prompts()
    made = {mode: FastSampler(policy.model, policy.placement, [7], slots=8, mode=mode) for mode in ("eager", "graphed")}
    found = {mode: [g[0].ids.tolist() for g in one.sample(own, Sampling(30))] for mode, one in made.items()}
    found["plain"] = [
        g[0].ids.tolist() for g in PlainSampler(policy.model, policy.placement, [7]).sample(own, Sampling(30))
    ]
    bound = 2e-2 if policy.placement.precision == "fp16" else 1e-4
    for mode in ("eager", "graphed"):
        for prompt, one, other in zip(own, found[mode], found["plain"], strict=True):
            if one != other:
                first = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
                logps = [trained_logps(policy, prompt, np.array(ids[: first + 1]))[-1] for ids in (one, other)]
                assert abs(logps[0] - logps[1]) < bound, (mode, first, logps)


def test_samples_do_not_depend_on_the_batch(policy):
    sampler, sampling = FastSampler(policy.model, policy.placement, [7], slots=16), Sampling(30, 1.0, 3)
    together = sampler.sample(prompts(6), sampling, samples=4)
    again = sampler.sample(prompts(6), sampling, samples=4)
    assert [[one.ids.tolist() for one in group] for group in together] == [
        [one.ids.tolist() for one in group] for group in again
    ]
    longer = sampler.sample(prompts(6), Sampling(300, 1.0, 3), samples=4)  # a larger cache: captured anew
    same = [a.ids[:30].tolist() == b.ids[:30].tolist() for g, h in zip(together, longer, strict=True)
            for a, b in zip(g, h, strict=True)]  # fmt: skip
    assert sum(same) >= 22
