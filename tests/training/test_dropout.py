"""Counter dropout: the hash in plain integers, the statistics of its masks, and where masks must be the same."""

from itertools import combinations

import helpers
import numpy as np
import pytest
import torch

from lowlevel.batch.layout import build_batch
from lowlevel.batch.segments import prompt_segment, sft_segment
from lowlevel.hashing import feature_keys, key32, mix32, mix32_array
from lowlevel.loop import evaluate_examples
from lowlevel.model.dropout import CounterDropout, DropoutState, drop

CPU = torch.device("cpu")
MASK = 2**32 - 1
FEATURES = 256


def lowbias32(x: int) -> int:
    """C. Wellons' lowbias32 in Python's own integers."""
    x ^= x >> 16
    x = (x * 0x7FEB352D) & MASK
    x ^= x >> 15
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def plain_key32(*parts: int) -> int:
    key = 0
    for part in parts:
        key = (lowbias32(key ^ (part & MASK)) + 0x9E3779B9) & MASK
    return lowbias32(key)


def plain_keep(token: int, feature: int, p: float) -> bool:
    """Whether a feature of a token is kept: the xor of their keys, mixed in two multiplications, as a signed int32."""
    bits = ((token ^ feature) * 0x7FEB352D) & MASK
    bits ^= (signed(bits) >> 16) & MASK
    bits = (bits * 0x846CA68B) & MASK
    return signed(bits) >= int(p * 2**32) - 2**31


def signed(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits


def masks(seed: int, step: int, *, salt: int = 0, p: float = 0.1, tokens: int = 200) -> torch.Tensor:
    """True where kept, (tokens, FEATURES), for the tokens of one long example."""
    state = DropoutState()
    ids = np.arange(tokens + 1)
    batch = build_batch([[sft_segment(3, 0, ids, ids)]], pairs=False)
    state.set_micro_batch(batch.dropout_keys, key32(seed, step))
    ones = torch.ones(1, batch.input_ids.shape[1], FEATURES)
    return CounterDropout(p, salt, FEATURES, state, CPU)(ones)[0, :tokens] > 0  # all padding has the same mask


def test_the_hash_in_torch_and_numpy_is_lowbias32():
    rng = np.random.default_rng(0)
    values = np.concatenate([np.array([0, 1, 2**31 - 1, 2**31, MASK]), rng.integers(0, 2**32, 20_000)]).astype(
        np.uint32
    )
    expected = np.array([lowbias32(int(v)) for v in values], np.uint32)
    assert (mix32_array(values) == expected).all()
    assert (mix32(torch.from_numpy(values.view(np.int32).copy())).numpy().view(np.uint32) == expected).all()


def test_the_hash_avalanches():
    """A mistyped constant would pass the comparison above if it were mistyped twice: each input bit flips 16 of 32."""
    values = np.random.default_rng(1).integers(0, 2**32, 20_000).astype(np.uint32)
    for bit in range(32):
        flipped = mix32_array(values) ^ mix32_array(values ^ np.uint32(1 << bit))
        shares = np.unpackbits(flipped.view(np.uint8)).reshape(-1, 8).reshape(-1, 32).mean(0)
        assert np.abs(shares - 0.5).max() < 0.03, bit


def test_keys_in_plain_integers():
    for parts in ((0,), (1, 2), (2**40 + 7, 3), (42, 2**31)):
        assert key32(*parts) & MASK == plain_key32(*parts)
    expected = [lowbias32(f ^ plain_key32(9)) for f in range(64)]
    assert (feature_keys(9, 64, CPU).numpy().view(np.uint32) == np.array(expected, np.uint32)).all()


def test_a_mask_in_plain_integers():
    """The whole chain, data row to bit: a run resumed by another version would else draw other masks in silence."""
    seed, step, salt, p = 42, 7, 5, 0.3
    segment = prompt_segment(1000, 0, np.arange(3), {1: np.arange(2), 2: np.arange(3)})
    batch = build_batch([[segment]], pairs=True)
    state = DropoutState()
    state.set_micro_batch(batch.dropout_keys, key32(seed, step))
    kept = CounterDropout(p, salt, 16, state, CPU)(torch.ones(1, batch.input_ids.shape[1], 16))[0] > 0
    for place, (branch, position) in enumerate(zip(segment.branch_ids, segment.position_ids, strict=True)):
        key = lowbias32((lowbias32(1000) + int(branch) * 0x632BE5AB) & MASK)
        key = lowbias32((key + int(position)) & MASK)
        token = lowbias32(key ^ plain_key32(seed, step))
        assert kept[place].tolist() == [plain_keep(token, lowbias32(f ^ plain_key32(salt)), p) for f in range(16)]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_rate_and_scale(p):
    kept = masks(1, 2, p=p)
    for part in (kept, *kept.split(20), *kept.split(32, dim=1)):  # over all, over spans of tokens, of features
        sigma = (part.numel() * p * (1 - p)) ** 0.5
        assert abs(int(part.sum()) - part.numel() * (1 - p)) < 5 * sigma
    token_keys = mix32(torch.arange(200, dtype=torch.int32))[None]
    scale = drop(torch.ones(1, 200, FEATURES), token_keys, feature_keys(0, FEATURES, CPU), p)
    assert sorted(scale.unique().tolist()) == pytest.approx([0.0, 1 / (1 - p)])
    assert scale.mean().item() == pytest.approx(1, abs=5 * (p / (1 - p) / scale.numel()) ** 0.5)


def test_masks_are_independent():
    """Of modules, steps and seeds, of neighbouring tokens and features; also those that swap or add up to the same."""
    base = masks(1, 2)
    others = {
        "module 1": masks(1, 2, salt=1),
        "module 2": masks(1, 2, salt=2),
        "step 3": masks(1, 3),
        "seed 2": masks(2, 2),
        "seed and step swapped": masks(2, 1),
        "next token": base.roll(1, 0),
        "next feature": base.roll(1, 1),
        "transposed": base.flatten().roll(FEATURES + 1).view(base.shape),
    }
    named = {"base": base, **others}
    bound = 5 / base.numel() ** 0.5
    for (name, a), (other, b) in combinations(named.items(), 2):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < bound, (name, other)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_features_and_no_two_tokens_go_together(p):
    """Each pair's correlation is normal with deviation 1 / sqrt(n): the width shows a general dependence, the largest
    one a pair that goes together; of 500,000 normal numbers one above 6.5 deviations comes once in 25,000 tests."""
    kept = torch.cat([masks(1, step, p=p, tokens=250) for step in range(8)])  # (2000, 256)
    wide = torch.cat([masks(1, 2, salt=salt, p=p, tokens=1000) for salt in range(8)], dim=1).T  # (2048, 1000)
    for columns in (kept, wide):
        scores = np.corrcoef(columns.numpy().T) * len(columns) ** 0.5
        scores = scores[np.triu_indices_from(scores, 1)]
        assert np.abs(scores).max() < 6.5
        assert abs(scores.std() - 1) < 0.02


def test_backward_uses_the_mask_of_the_forward_pass():
    state = DropoutState()
    state.set_micro_batch(torch.arange(10, dtype=torch.int32)[None], key32(1, 2))
    layer = CounterDropout(0.3, 4, 6, state, CPU)
    x = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), x.detach() * x.grad, rtol=0, atol=0)
    assert (x.grad == 0).any()
    assert torch.autograd.gradcheck(layer, (x,))


def masks_by_token(method, examples) -> dict[tuple, torch.Tensor]:
    """Mask of each (token, branch, position); every token of `examples` is another one."""
    found = {}
    for batch in method.micro_batches(examples):
        state = DropoutState()
        state.set_micro_batch(batch.dropout_keys, key32(1, 2))
        kept = CounterDropout(0.3, 0, 64, state, CPU)(torch.ones(*batch.input_ids.shape, 64)) > 0
        for r, t in (batch.segment_ids >= 0).nonzero().tolist():
            name = (int(batch.input_ids[r, t]), int(batch.branch_ids[r, t]), int(batch.position_ids[r, t]))
            assert name not in found or torch.equal(found[name], kept[r, t])
            found[name] = kept[r, t]
    return found


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_masks_do_not_depend_on_the_layout(kind):
    rng, tokens = np.random.default_rng(0), iter(range(10_000))

    def fresh(longest):
        return np.array([next(tokens) for _ in range(rng.integers(2, longest))])

    if kind == "sft":
        examples = [helpers.Tokens(row, ids, ids) for row in range(6) for ids in [fresh(30)]]
        make = helpers.sft
    else:
        examples = [helpers.Pair(row, fresh(20), fresh(10), fresh(10)) for row in range(6)]
        make = helpers.dpo
    expected = masks_by_token(make(1), examples)
    assert len({tuple(mask.tolist()) for mask in expected.values()}) == len(expected)
    for method, order in ((make(6), 1), (make(2, packing=True), 1), (make(3), -1)):
        found = masks_by_token(method, examples[::order])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_recompute_draws_the_same_mask(tiny_base, kind):
    outcomes = []
    for checkpointing in (False, True):
        policy = helpers.make_policy(tiny_base, dropout=0.4, checkpointing=checkpointing)
        method = helpers.sft(2) if kind == "sft" else helpers.dpo(2, disable_dropout=False)
        examples = helpers.ragged_examples() if kind == "sft" else helpers.ragged_pairs()
        outcomes.append(helpers.loss_and_gradient(policy, method, examples))
    assert outcomes[0][0] == outcomes[1][0] and torch.equal(outcomes[0][1], outcomes[1][1])


def test_dropout_acts_in_training_and_changes_from_step_to_step(tiny_base):
    policy, plain = helpers.make_policy(tiny_base, dropout=0.4), helpers.make_policy(tiny_base)
    method, examples = helpers.sft(), helpers.ragged_examples()
    losses = [helpers.step(policy, method, examples, number=number, seed=seed).metrics["loss"]
              for number, seed in ((0, 1), (1, 1), (0, 2))]  # fmt: skip
    losses.append(helpers.step(plain, method, examples).metrics["loss"])
    assert len(set(losses)) == 4
    assert helpers.step(policy, method, examples, number=0, seed=1).metrics["loss"] == losses[0]
    pairs, off = helpers.ragged_pairs(), helpers.dpo()
    assert helpers.step(policy, off, pairs).metrics["loss"] == helpers.step(plain, off, pairs).metrics["loss"]


def test_every_lora_layer_has_its_own_mask(tiny_base):
    policy = helpers.make_policy(tiny_base, dropout=0.4)
    modules = [m for m in policy.model.modules() if isinstance(m, CounterDropout)]
    assert len(modules) == 2 * 7  # two blocks of seven projections
    assert len({m.feature_keys[0].item() for m in modules}) == len(modules)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in policy.model.modules())


def test_no_dropout_in_evaluation(tiny_base):
    policy, plain = helpers.make_policy(tiny_base, dropout=0.4), helpers.make_policy(tiny_base)
    for method, examples in ((helpers.sft(), helpers.ragged_examples()),
                             (helpers.dpo(disable_dropout=False), helpers.ragged_pairs())):  # fmt: skip
        batches = method.micro_batches(examples)
        policy.dropout.set_micro_batch(batches[0].dropout_keys, key32(1, 2))  # as a training step leaves it
        scores = evaluate_examples(policy, method, batches, prefix="eval_")
        assert scores == evaluate_examples(plain, method, batches, prefix="eval_")


def test_no_dropout_in_the_reference_and_the_same_keys_after_it(tiny_base, parent_adapter):
    policy = helpers.make_policy(tiny_base, dropout=0.4, parent=parent_adapter)
    plain = helpers.make_policy(tiny_base, parent=parent_adapter)
    (batch,) = helpers.dpo().micro_batches(helpers.ragged_pairs())
    policy.dropout.set_micro_batch(batch.dropout_keys, key32(1, 2))
    keys = policy.dropout.token_keys.clone()
    with torch.no_grad():
        before = helpers.completion_logps(policy, batch)
        with policy.reference():
            assert policy.dropout.token_keys is None
            reference = helpers.completion_logps(policy, batch)
        with plain.reference():
            expected = helpers.completion_logps(plain, batch)
        after = helpers.completion_logps(policy, batch)
    assert all(map(torch.equal, reference, expected))
    assert torch.equal(policy.dropout.token_keys, keys) and all(map(torch.equal, before, after))
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.dropout.token_keys, keys)
