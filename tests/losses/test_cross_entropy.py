"""Cross-entropy and sequence log-probabilities: hand values, the shift, the mask, sums instead of means."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lowlevel.losses import masked_cross_entropy, sequence_logps

ROW = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
ROW_LOSS = 0.4401896985611953  # log(1 + e^-1 + e^-2 + e^-3)


def random_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, :3] = labels[1, 4:] = labels[2, 2] = -100
    return logits, labels


def test_hand_value() -> None:
    loss_sum, count = masked_cross_entropy(ROW.expand(1, 2, 4), torch.tensor([[3, 0]]))
    assert loss_sum.item() == pytest.approx(ROW_LOSS, abs=1e-15)
    assert (count.item(), count.dtype, loss_sum.shape) == (1, torch.int64, ())


def test_torch_smoothing_of_the_same_row_is_another_number() -> None:
    """0.590 is what eps = 0.1 spread over all V classes gives: the value to expect where somebody smooths."""
    smoothed = cross_entropy(ROW[None], torch.tensor([0]), label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.5901896985611953, abs=1e-15)


def test_uniform_logits_over_a_llama_vocabulary() -> None:
    loss_sum, count = masked_cross_entropy(torch.zeros(1, 3, 32000), torch.tensor([[5, 7, 31999]]))
    assert loss_sum.item() / count.item() == pytest.approx(10.373491181781864, abs=1e-6)


def test_all_masked_is_a_differentiable_zero() -> None:
    logits = torch.randn(2, 4, 7, requires_grad=True)
    loss_sum, count = masked_cross_entropy(logits, torch.full((2, 4), -100))
    loss_sum.backward()
    assert (loss_sum.item(), count.item()) == (0.0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_one_masked_row_has_no_gradient() -> None:
    logits, labels = random_batch()
    labels[1] = -100
    logits.requires_grad_()
    masked_cross_entropy(logits, labels)[0].backward()
    assert logits.grad[1].abs().max() == 0
    assert logits.grad[0].abs().max() > 0


@pytest.mark.parametrize("shape", [(2, 1, 7), (0, 4, 7)])
def test_nothing_to_score(shape: tuple[int, int, int]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    loss_sum, count = masked_cross_entropy(logits, torch.zeros(shape[:2], dtype=torch.int64))
    loss_sum.backward()
    assert (loss_sum.item(), count.item()) == (0.0, 0)
    assert sequence_logps(logits, torch.zeros(shape[:2], dtype=torch.int64))[0].shape == shape[:1]


def test_sums_over_micro_batches_give_the_token_mean() -> None:
    """(4.0, 1 token) and (1.0, 9 tokens): 13/10 = 1.3. The mean of means would be 2.5."""
    # two classes at logits (0, c): loss log(1 + e^c) = L for c = log(e^L - 1)
    batches = []
    for loss, tokens in ((4.0, 1), (1.0, 9)):
        logits = torch.tensor([0.0, math.log(math.expm1(loss))], dtype=torch.float64).expand(1, tokens + 1, 2)
        batches.append(masked_cross_entropy(logits, torch.zeros(1, tokens + 1, dtype=torch.int64)))
    total, count = (torch.stack(column).sum() for column in zip(*batches, strict=True))
    assert (total / count).item() == pytest.approx(1.3, abs=1e-12)
    assert sum((s / c).item() for s, c in batches) / 2 == pytest.approx(2.5, abs=1e-12)


def test_shift_scores_the_first_completion_token_and_never_the_first_token() -> None:
    logits, _ = random_batch()
    one_token = torch.full((3, 6), -100)
    one_token[:, 3] = 4  # prompt of 3 tokens, completion of one: log softmax at the last prompt position
    logps, lengths = sequence_logps(logits, one_token)
    torch.testing.assert_close(logps, logits.log_softmax(-1)[:, 2, 4])
    assert lengths.tolist() == [1, 1, 1]
    first = torch.full((3, 6), -100)
    first[:, 0] = 4
    assert masked_cross_entropy(logits, first)[1].item() == 0
    last_logits = logits.clone()
    last_logits[:, -1] += 5  # predicts a token after the end: never read
    assert torch.equal(sequence_logps(last_logits, one_token)[0], logps)


def test_sequence_logps_by_a_loop() -> None:
    logits, labels = random_batch()
    logps, lengths = sequence_logps(logits, labels)
    for row in range(3):
        terms = []
        for t in range(5):
            if labels[row, t + 1] >= 0:
                weights = [math.exp(z) for z in logits[row, t].tolist()]
                terms.append(math.log(weights[labels[row, t + 1]] / sum(weights)))
        assert logps[row].item() == pytest.approx(sum(terms), abs=1e-12)
        assert lengths[row].item() == len(terms)
    loss_sum, count = masked_cross_entropy(logits, labels)
    assert loss_sum.item() == pytest.approx(-logps.sum().item(), abs=1e-12)
    assert count.item() == lengths.sum().item()


def test_gradcheck() -> None:
    logits, labels = random_batch()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: masked_cross_entropy(z, labels)[0], logits)
    assert torch.autograd.gradcheck(lambda z: sequence_logps(z, labels)[0], logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_reduced_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = random_batch(dtype)
    loss_sum, _ = masked_cross_entropy(logits, labels)
    exact, _ = masked_cross_entropy(logits.double(), labels)
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(exact.item(), rel=1e-6)


def test_wrong_shapes_and_labels_are_errors() -> None:
    logits, labels = random_batch()
    for function in (masked_cross_entropy, sequence_logps):
        with pytest.raises(ValueError, match=r"labels \(B, T\), got \(3, 6, 11\) and \(3, 5\)"):
            function(logits, labels[:, 1:])
        with pytest.raises(ValueError, match="logits must be"):
            function(logits[0], labels[0])
        with pytest.raises(IndexError):
            function(logits, torch.full((3, 6), 11))
        with pytest.raises(IndexError):
            function(logits, torch.full((3, 6), -1))
