"""Records of tokens and pairs: against plain forward passes, against the training losses, and against themselves."""

from dataclasses import replace

import helpers
import pytest
import torch
from samples import chats, labelled, pairs

from lowlevel.batch.layout import Shape
from lowlevel.config.offline import DPOConfig
from lowlevel.inspection.example import Example, Text
from lowlevel.inspection.labelled import inspect_labelled
from lowlevel.inspection.pairs import inspect_pairs
from lowlevel.inspection.reading import READINGS
from lowlevel.inspection.sft import inspect_sft
from lowlevel.loop import evaluate_examples
from lowlevel.losses import LOSSES
from lowlevel.losses.dpo import PairLogps
from lowlevel.methods.dpo import preference_loss
from lowlevel.model.placement import Placement
from lowlevel.model.policy import Policy

LAYOUTS = [{"packing": True}, {"packing": False}, {"packing": False, "batch_size": 3}]
WITH_MARGIN = {name for name, spec in LOSSES.items() if spec.needs_margin}
OF_SUMS = [name for name, spec in LOSSES.items() if not (spec.needs_tokens or spec.needs_margin or spec.statistics)]
EXTRA = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.2}, "exo_pair": {"label_smoothing": 0.01}}


def logits_of(policy, ids, *, trained: bool = True) -> torch.Tensor:
    """Hugging Face's own logits of one unpadded sequence, (L, V) in float64."""
    policy.dropout.disable()
    policy.activate(parent=True, trained=trained)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.as_tensor(ids, dtype=torch.int64)[None]).logits[0].double()
    policy.activate(parent=True, trained=True)
    return logits


def check_tokens(record: Text, logits: torch.Tensor, ids: list[int], start: int) -> None:
    """The tokens from position `start` on, from the logits of the whole sequence."""
    assert record.token_ids.tolist() == ids[start:]
    assert record.positions == list(range(start, len(ids)))
    logps = logits[start - 1 : -1].log_softmax(1)
    for i, token in enumerate(ids[start:]):
        order = logps[i].argsort(descending=True).tolist()
        assert float(next(iter(record.columns.values()))[i]) == pytest.approx(float(logps[i, token]), abs=1e-4)
        entropy = float(-(logps[i].exp() * logps[i]).sum())
        assert float(record.columns["entropy"][i]) == pytest.approx(entropy, abs=1e-4)
        assert int(record.columns["rank"][i]) == order.index(token) + 1
        assert record.predicted.alternative_ids[i].tolist() == [other for other in order if other != token][:3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_of_a_conversation_is_what_a_plain_forward_gives(policy, layout):
    examples = chats()
    records = inspect_sft(policy, helpers.sft(**layout), examples)
    assert [record.row for record in records] == [example.row for example in examples]
    for record, example in zip(records, examples, strict=True):
        start = int((example.labels != -100).argmax())
        check_tokens(record.texts[0], logits_of(policy, example.input_ids), example.input_ids.tolist(), start)
        (text,) = record.texts
        assert text.ids.tolist() == example.input_ids.tolist()
        assert record.loss == pytest.approx(-float(text.columns["logp"].sum()), rel=1e-6)
        assert float(text.columns["share"].sum()) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(text.columns["share"] * record.loss, -text.columns["logp"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_of_a_pair_is_what_plain_forwards_give(policy, layout):
    examples = pairs()
    records = inspect_pairs(policy, helpers.dpo(**layout), examples)
    assert [record.row for record in records] == [example.row for example in examples]
    for record, example in zip(records, examples, strict=True):
        prompt = example.prompt_ids.tolist()
        assert record.prompt_ids.tolist() == prompt
        for side, completion in ((record.texts[0], example.chosen_ids), (record.texts[1], example.rejected_ids)):
            ids = [*prompt, *completion.tolist()]
            check_tokens(side, logits_of(policy, ids), ids, len(prompt))
            reference = logits_of(policy, ids, trained=False)[len(prompt) - 1 : -1].log_softmax(1)
            expected = reference.gather(1, torch.tensor(ids[len(prompt) :])[:, None])[:, 0]
            assert torch.allclose(side.columns["reference"].double(), expected, atol=1e-4)
            assert float(side.numbers["reference"]) == pytest.approx(float(expected.sum()), abs=1e-4)
            assert float(side.numbers["reward"]) == pytest.approx(
                0.1 * float(side.columns["policy"].sum() - expected.sum()), abs=1e-5
            )


def config_of(name: str) -> DPOConfig:
    beta = {"beta": 0.3} if "beta" in LOSSES[name].parameters else {}
    return DPOConfig(loss_type=name, **beta, **EXTRA.get(name, {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITH_MARGIN])
def test_losses_are_those_of_training(policy, name, layout):
    method = replace(helpers.dpo(**layout), config=config_of(name))
    records = inspect_pairs(policy, method, pairs())
    logged = evaluate_examples(policy, method, method.micro_batches(pairs()), prefix="")
    mean = {
        "loss": [record.loss for record in records],
        "rewards/margins": [record.numbers["margin"] for record in records],
        "rewards/chosen": [record.texts[0].numbers["reward"] for record in records],
        "rewards/rejected": [record.texts[1].numbers["reward"] for record in records],
        "logps/chosen": [record.texts[0].numbers["policy"] for record in records],
        **(
            {"logps/ref_rejected": [record.texts[1].numbers["reference"] for record in records]}
            if method.has_reference
            else {}
        ),
    }
    for name, values in mean.items():
        assert sum(values) / len(values) == pytest.approx(logged[name], abs=1e-5), name


def argument(record: Example) -> float:
    return record.numbers.get("averaged margin", record.numbers["margin"])


def logps_of(records: list[Example]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The four log-probabilities and two lengths, (P,) float64 each."""
    sides = [[record.texts[i] for record in records] for i in (0, 1)]
    names = ("policy", "reference")
    logps = [torch.tensor([side.numbers[name] for side in part]).double() for name in names for part in sides]
    return logps, [torch.tensor([len(side.scored) for side in part]).double() for part in sides]


@pytest.mark.parametrize("name", OF_SUMS)
def test_contributions_add_up_and_weights_are_slopes(policy, name):
    """A weight is minus the slope of the summed loss in one completion's contributions: by finite differences."""
    config = config_of(name)
    records = inspect_pairs(policy, replace(helpers.dpo(), config=config), pairs())
    (chosen, rejected, *reference), lengths = logps_of(records)
    averages, own = READINGS[name] == "averages" or LOSSES[name].averages, LOSSES[name].averages

    def total(plus: torch.Tensor, minus: torch.Tensor) -> float:
        return float(preference_loss(config)(PairLogps(plus, minus, *reference, *lengths)).losses.sum())

    for i, record in enumerate(records):
        added = float(record.texts[0].columns["adds"].sum() + record.texts[1].columns["adds"].sum())
        assert added == pytest.approx(argument(record), abs=1e-5)
        size = max(
            1.0, float(record.texts[0].columns["adds"].abs().sum() + record.texts[1].columns["adds"].abs().sum())
        )
        assert float(record.running("adds")[-1]) == pytest.approx(added, abs=1e-6 * size)
        scales = [config.beta / (float(n[i]) if averages else 1) for n in lengths]
        sums = scales[0] * (chosen - reference[0])[i] - scales[1] * (rejected - reference[1])[i]
        assert argument(record) == pytest.approx(float(sums), abs=1e-5)
        counts = lengths if own else [torch.ones(len(records))] * 2
        margin = config.beta * float(((chosen - reference[0]) / counts[0] - (rejected - reference[1]) / counts[1])[i])
        assert float(record.numbers["margin"]) == pytest.approx(margin, abs=1e-5)
        nudge = torch.zeros(len(records), dtype=torch.float64)
        nudge[i] = 1e-4
        up = total(chosen + nudge / scales[0], rejected) - total(chosen - nudge / scales[0], rejected)
        down = total(chosen, rejected - nudge / scales[1]) - total(chosen, rejected + nudge / scales[1])
        assert float(record.values("weight")[0]) == pytest.approx(-up / 2e-4, abs=2e-3, rel=2e-3)
        assert float(record.values("weight")[-1]) == pytest.approx(-down / 2e-4, abs=2e-3, rel=2e-3)


def of(name: str, a: float, b: float, lengths=(4.0, 5.0), *, reference: float = -10.0) -> torch.Tensor:
    """A loss of log-ratios a, b, as the second of two pairs, in float64; without a reference, of `reference` + a, b."""
    values = [torch.tensor([first, reference + d], dtype=torch.float64) for first, d in ((5.0, a), (0.2, b))]
    base = torch.tensor([0.0, 0.0 if LOSSES[name].reference_free else reference], dtype=torch.float64)
    sizes = [torch.tensor([3.0, n], dtype=torch.float64) for n in lengths]
    return LOSSES[name].function(PairLogps(*values, base, base, *sizes), **keys_of(name))[1]


def keys_of(name: str) -> dict[str, float]:
    keys = {"beta": 0.3, "label_smoothing": 0.1}
    return {key: value for key, value in keys.items() if key in LOSSES[name].parameters}


def test_the_table_has_every_loss():
    assert READINGS.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", OF_SUMS)
def test_what_a_loss_reads_is_in_the_table(name):
    free = LOSSES[name].reference_free
    start = -10.0 if free else 0.0  # of what the averages are taken
    point = of(name, 1.0, -0.5)
    same_margin = [of(name, -1.0, -2.5), of(name, 1.0, -0.5, (8.0, 2.0)), of(name, 1.0, -0.5, reference=-20.0)]
    same_averages = [of(name, 2.0 + start, -0.25 - start / 2, (8.0, 2.5)), of(name, 1.4, 0.0)]
    same_averages += [] if free else [of(name, 1.0, -0.5, reference=-20.0)]
    by_margin, by_averages = (
        all(torch.allclose(point, other) for other in others) for others in (same_margin, same_averages)
    )
    alone = LOSSES[name].function(
        PairLogps(*(torch.tensor([value]) for value in (-9.0, -10.5, *[0.0 if free else -10.0] * 2, 4.0, 5.0))),
        **keys_of(name),
    )
    by_batch = not torch.allclose(alone.double(), point[None], atol=1e-5)
    found = "quantiles" if by_batch else "margin" if by_margin else "averages" if by_averages else "both"
    assert READINGS[name] == found


def test_one_forward_pass_of_the_policy_and_one_of_the_reference(policy, monkeypatch):
    passes = []
    forward = Policy.scored_hidden_states

    def counted(self, batch):
        passes.append(self.lora_layers[0].active_adapters)
        return forward(self, batch)

    monkeypatch.setattr(Policy, "scored_hidden_states", counted)
    inspect_pairs(policy, helpers.dpo(), pairs())
    inspect_sft(policy, helpers.sft(), chats())
    assert passes == [[], ["trained"], ["trained"]]


def test_dropout_is_off(policy):
    """Whatever the step before has left behind; of one key all tokens of any shape draw the same mask."""
    methods = ((inspect_sft, helpers.sft(), chats()), (inspect_pairs, helpers.dpo(), pairs()))
    for inspect, method, examples in methods:
        policy.dropout.disable()
        off = inspect(policy, method, examples)
        policy.dropout.token_keys = torch.zeros(1, 1, dtype=torch.int32)
        on = inspect(policy, method, examples)
        assert [record.loss for record in on] == [record.loss for record in off]


def test_nothing_changes_in_the_policy(policy):
    policy.dropout.token_keys = torch.zeros(1, 1, dtype=torch.int32)
    before, weights = policy.trainable_names(), policy.flat.weights.clone()
    records = inspect_pairs(policy, helpers.dpo(), pairs())
    assert not policy.model.training
    assert policy.trainable_names() == before
    assert torch.equal(policy.flat.weights, weights) and not policy.flat.grad.any()
    for text in (text for record in records for text in record.texts):
        assert not any(column.requires_grad for column in text.columns.values())


def test_a_row_may_come_twice(policy):
    for inspect, method, rows in ((inspect_sft, helpers.sft(), chats()), (inspect_pairs, helpers.dpo(), pairs())):
        *found, last = inspect(policy, method, [*rows, rows[3]])
        assert [one.row for one in (*found, last)] == [row.row for row in (*rows, rows[3])]
        assert last.loss == pytest.approx(found[3].loss, abs=1e-5)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLACEMENTS = [
    pytest.param(Placement(torch.device("cpu"), "bf16"), id="cpu-bf16"),
    pytest.param(Placement(torch.device("cuda"), "fp16"), id="cuda-fp16", marks=needs_gpu),
]


@pytest.fixture(params=PLACEMENTS)
def rough(request, tiny_base):
    return helpers.make_policy(tiny_base, quantised=True, dropout=0.3, placement=request.param)


@pytest.mark.parametrize("packing", [True, False])
def test_the_losses_are_those_of_training(rough, packing):
    for method, examples, inspect in (
        (helpers.sft(packing=packing), chats(), inspect_sft),
        (helpers.dpo(packing=packing), pairs(), inspect_pairs),
        (helpers.kto(packing=packing), labelled(), inspect_labelled),
    ):
        records = inspect(rough, method, examples)
        count = sum(record.count for record in records)
        logged = evaluate_examples(rough, method, method.micro_batches(examples), prefix="")["loss"]
        assert float(sum(record.loss for record in records)) / count == pytest.approx(logged, abs=1e-5)


def test_records_are_fp32_on_the_cpu_and_add_up(rough):
    for record in inspect_pairs(rough, helpers.dpo(), pairs()):
        for side in record.texts:
            for name in ("policy", "reference", "adds", "entropy"):
                assert (side.columns[name].dtype, side.columns[name].device.type) == (torch.float32, "cpu")
            assert (side.columns["rank"] >= 1).all() and torch.isfinite(side.columns["policy"]).all()
        added = float(record.texts[0].columns["adds"].sum() + record.texts[1].columns["adds"].sum())
        assert added == pytest.approx(float(record.numbers["margin"]), abs=1e-5)


SHAPE = Shape(positions=16, examples=4, longest=64, capacity=96)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "rpo"])
def test_pairs_in_filled_batches_are_the_same(policy, name):
    plain = helpers.dpo(packing=True, loss_type=name)
    filled = replace(plain, shape=SHAPE)
    batches = filled.micro_batches(pairs(7))
    assert any(len(batch.lengths) // 2 > len(batch.data_rows) for batch in batches)
    assert any(len(batch.scored_positions) > batch.num_scored for batch in batches)
    for one, other in zip(inspect_pairs(policy, filled, pairs(7)), inspect_pairs(policy, plain, pairs(7)), strict=True):
        assert one.row == other.row
        for side, same in zip(one.texts, other.texts, strict=True):
            assert torch.equal(side.token_ids, same.token_ids)
            assert side.positions == same.positions
            assert torch.allclose(side.columns["adds"], same.columns["adds"], atol=1e-5)
        assert one.values("weight") == pytest.approx(other.values("weight"), abs=1e-5)
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
        assert float(one.numbers["margin"]) == pytest.approx(float(other.numbers["margin"]), abs=1e-5)


def test_conversations_in_filled_batches_are_the_same(policy):
    plain = helpers.sft(packing=True)
    for one, other in zip(
        inspect_sft(policy, replace(plain, shape=SHAPE), chats()),
        inspect_sft(policy, plain, chats()),
        strict=True,
    ):
        (text,), (same,) = one.texts, other.texts
        assert torch.equal(text.token_ids, same.token_ids)
        assert torch.allclose(text.columns["logp"], same.columns["logp"], atol=1e-5)
        assert torch.equal(text.columns["rank"], same.columns["rank"])
