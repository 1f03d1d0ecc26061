"""Timed steps are the run's own first steps, and leave nothing behind; which of them count."""

from functools import partial
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import step_result
from torch._dynamo.utils import counters

from lowlevel import execution as execution_module
from lowlevel.batch.layout import Shape
from lowlevel.batch.order import DataOrder
from lowlevel.config.offline import DPOConfig, SFTConfig
from lowlevel.config.schema import RunConfig, TrainConfig
from lowlevel.errors import ConfigError
from lowlevel.execution import Eager, ExecutionFailedError, Graphed, WithFallback, signature_of
from lowlevel.hashing import key32
from lowlevel.loop import train
from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.optim.train_state import TrainState
from lowlevel.running.job import Job
from lowlevel.timing import phases
from lowlevel.timing.phases import BACKWARD, FORWARD, LAYOUT, OTHER
from lowlevel.timing.steps import Recorder, Step, Watched, mean_phases, take_steps, whole

COUNT = 5  # of a run with three steps an epoch
TRAIN = TrainConfig(learning_rate=1e-2, logging_steps=2, save_steps=1, max_steps=3, seed=1)
METHODS = {
    "sft": (SFT(SFTConfig(), 2, 48, True), helpers.ragged_examples(10)),
    "dpo": (DPO(DPOConfig(), 2, 64, True), helpers.ragged_pairs(10)),
}


def job_of(method, policy, optimizer, order, examples) -> Job:
    inputs = SimpleNamespace(data=SimpleNamespace(train=examples))
    return Job(RunConfig(train=TRAIN), inputs, method, policy, optimizer, order, 3, {})


def run_of(tiny_base, name: str) -> Job:
    method, examples = METHODS[name]
    policy = helpers.make_policy(tiny_base, dropout=0.3)
    optimizer = build_optimizer(policy.flat.weights, TRAIN)
    return job_of(method, policy, optimizer, DataOrder(10, 4, 1, True), examples)


def batches_of(run: Job, step: int):
    return run.method.micro_batches([run.inputs.data.train[i] for i in run.order.step_rows(step)])


def eager(run: Job) -> WithFallback:
    return WithFallback(run.policy, run.method, "eager", pytest.fail)


def numbers(result):
    return result.step, result.metrics, result.grad_norm, result.learning_rate, result.count, result.rows


class Kept:
    """What the loop reports, as results."""

    def __init__(self) -> None:
        self.results = []

    def progress(self, state, result):
        self.results.append(result)

    def log(self, record): ...
    def save(self, state): ...
    def stop_requested(self):
        return 0


def trained(run: Job) -> Kept:
    """The same steps as `lowlevel sft` takes them."""
    observer = Kept()
    state = TrainState(LossScale.for_precision("fp32"))
    batches = partial(batches_of, run)
    steps = train(Eager(run.policy, run.method), run.optimizer, state, batches, None, observer, TRAIN,
          total_steps=COUNT, steps_per_epoch=3)  # fmt: skip
    for _ in steps:
        pass
    return observer


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_steps_are_those_of_training_bit_for_bit_and_nothing_is_kept(tiny_base, name, divide):
    expected = trained(run_of(tiny_base, name)).results
    run = run_of(tiny_base, name)
    before, names = run.policy.flat.weights.detach().clone(), run.policy.trainable_names()
    taken = take_steps(run, eager(run), COUNT, divide=divide)
    assert [numbers(step.result) for step in taken] == [numbers(result) for result in expected]
    assert len({result.metrics["loss"] for result in expected}) == COUNT  # so each update was made
    assert torch.equal(run.policy.flat.weights, before) and run.policy.trainable_names() == names
    assert [step.result.step for step in taken] == [1, 2, 3, 4, 5]
    assert all(step.counts and step.seconds > 0 for step in taken)
    assert all((LAYOUT in step.phases) == divide and (set(step.phases) == {OTHER}) != divide for step in taken)


def test_weights_are_put_back_after_an_error_too(tiny_base, monkeypatch):
    run = run_of(tiny_base, "sft")
    before = run.policy.flat.weights.detach().clone()

    def fails(state, result):
        assert not torch.equal(run.policy.flat.weights, before)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Recorder, "progress", lambda self, state, result: fails(state, result))
    with pytest.raises(RuntimeError, match="out of luck"):
        take_steps(run, eager(run), 2)
    assert torch.equal(run.policy.flat.weights, before)


# Which steps count


class Inner:
    """A mode of execution that does what a test says."""

    def __init__(self, *does) -> None:
        self.does = list(does)

    def run(self, *arguments):
        return self.does.pop(0)() if self.does else {}


def fallback(inner, mode="compiled"):
    return SimpleNamespace(execution=inner, mode=mode, run=inner.run, policy=None, method=None)


def batch_of(name="sft", count=4):
    method, examples = METHODS[name]
    return method.micro_batches(examples[:count])[0]


def test_a_step_that_compiles_is_told(monkeypatch):
    monkeypatch.setitem(counters["stats"], "unique_graphs", 3)

    def compiles():
        counters["stats"]["unique_graphs"] += 1

    watched = Watched(fallback(Inner(dict, compiles, dict)))
    found = []
    for _ in range(3):
        watched.run(batch_of(), 1.0, key32(0, 0))
        found.append(watched.take())
    assert found == [False, True, False]


def test_a_step_of_several_micro_batches_is_told_once(monkeypatch):
    monkeypatch.setitem(counters["stats"], "unique_graphs", 3)
    watched = Watched(fallback(Inner(lambda: counters["stats"].update(unique_graphs=4), dict)))
    watched.run(batch_of(), 1.0, key32(0, 0))
    watched.run(batch_of(), 1.0, key32(0, 0))
    assert watched.take() and not watched.take()


def test_a_shape_that_no_graph_knows_is_told_also_where_it_runs_uncaptured():
    inner = Graphed.__new__(Graphed)
    first, second = batch_of(count=4), batch_of(count=2)
    assert signature_of(first) != signature_of(second)
    inner.captured = {}
    watched = Watched(fallback(inner, "graphed"))
    found = []
    for batch, captures in ((first, False), (first, True), (first, False), (second, True), (first, False)):

        def runs(*_, batch=batch, captures=captures):
            if captures:
                inner.captured[signature_of(batch)] = object()

        watched.execution.run = runs
        watched.run(batch, 1.0, key32(0, 0))
        found.append(watched.take())
    assert found == [True, True, False, True, False]


def test_a_mode_that_falls_back_is_told(tiny_base):
    run = run_of(tiny_base, "sft")
    execution = WithFallback(run.policy, run.method, "compiled", lambda line: None)

    class Broken:
        def run(self, *arguments):
            raise RuntimeError("no compiler")

    execution.execution = Broken()
    watched = Watched(execution)
    with pytest.raises(ExecutionFailedError):
        watched.run(batch_of(), 1.0, key32(0, 0))
    assert watched.take() and execution.mode == "eager"


def test_a_step_that_overflowed_does_not_count(tiny_base, monkeypatch):
    """fp16's loss scale on a CPU: the first attempt at the second step gives a gradient that is not finite."""
    run, calls = run_of(tiny_base, "sft"), []
    first, whole = len(batches_of(run, 0)), execution_module.micro_step

    def micro_step(policy, *arguments):
        calls.append(arguments)
        sums = whole(policy, *arguments)
        if len(calls) == first + 1:
            policy.flat.grad.fill_(float("inf"))
        return sums

    monkeypatch.setattr(execution_module, "micro_step", micro_step)
    monkeypatch.setattr(LossScale, "for_precision", classmethod(lambda cls, precision: cls(scale=4.0)))
    taken = take_steps(run, eager(run), 4)
    assert [step.repeated for step in taken] == [False, True, False, False]
    assert [step.counts for step in taken] == [True, False, True, True]


def test_compiled_layers(tiny_base):
    """Really compiled: once, in the first step; and divided, which a captured graph could not be."""
    torch._dynamo.reset()
    examples = helpers.ragged_examples(8)
    method = SFT(SFTConfig(), 2, 48, True, Shape(positions=16, examples=4, longest=64, capacity=96))
    policy = helpers.make_policy(tiny_base, attention="lowlevel_math")
    optimizer = build_optimizer(policy.flat.weights, TRAIN)
    run = job_of(method, policy, optimizer, DataOrder(8, 4, 1, False), examples)
    taken = take_steps(run, WithFallback(policy, method, "compiled", pytest.fail), 4, divide=True)
    assert [step.set_up for step in taken] == [True, False, False, False]
    assert taken[0].seconds > taken[3].seconds and {FORWARD, BACKWARD, LAYOUT} < set(taken[3].phases)


def step(seconds=1.0, *, tokens=60, supervised=20, positions=80, set_up=False, repeated=False, **parts) -> Step:
    result = step_result({"loss": 1.0}, supervised, tokens=tokens, supervised=supervised, positions=positions)
    return Step(parts or {OTHER: seconds}, result, set_up, repeated)


def test_whole_steps():
    times = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
    found = whole([step(one) for one in reversed(times)])
    assert found.counted == 11
    assert (found.p10_ms, found.median_ms, found.p90_ms) == pytest.approx((200, 600, 1000))
    assert found.tokens_per_second == pytest.approx(11 * 60 / 6.6)  # all tokens over all seconds, not a mean of rates
    assert found.supervised_tokens_per_second == pytest.approx(11 * 20 / 6.6)
    assert found.padding_share == pytest.approx(0.25)
    assert (found.set_up.count, found.set_up.median_ms) == (found.repeated.count, found.repeated.median_ms) == (0, None)


def test_steps_of_other_sizes_weigh_by_their_size():
    found = whole([step(1.0, tokens=100, supervised=10, positions=100), step(3.0, tokens=20, supervised=2)])
    assert found.tokens_per_second == 30 and found.supervised_tokens_per_second == 3
    assert found.padding_share == pytest.approx(1 - 120 / 180)


def test_what_does_not_count_is_told_apart():
    slow = [step(9.0, set_up=True), step(5.0, set_up=True, repeated=True), step(2.0, repeated=True)]
    found = whole([step(0.1), *slow, step(0.1)])
    assert found.counted == 2 and found.median_ms == found.p90_ms == pytest.approx(100)
    assert (found.set_up.count, found.set_up.median_ms) == (2, pytest.approx(7000))
    assert (found.repeated.count, found.repeated.median_ms) == (1, pytest.approx(2000))


def test_nothing_to_count_is_an_error():
    for summary in (whole, mean_phases):
        with pytest.raises(ConfigError, match="--steps 2: each of these steps"):
            summary([step(set_up=True), step(repeated=True)])


def test_phases_are_means_that_add_up():
    steps = [
        step(**{phases.BACKWARD: 0.3, phases.FORWARD: 0.1, OTHER: 0.1}),
        step(**{phases.BACKWARD: 0.5, phases.COPY: 0.2, OTHER: 0.1}),
        step(**{phases.OPTIMIZER: 9.0}, set_up=True),
    ]
    found = mean_phases(steps)
    assert list(found) == [phases.COPY, phases.FORWARD, phases.BACKWARD, OTHER]  # as a step goes
    assert found == pytest.approx({phases.COPY: 100, phases.FORWARD: 50, phases.BACKWARD: 400, OTHER: 100})
    assert sum(found.values()) == pytest.approx(1e3 * (steps[0].seconds + steps[1].seconds) / 2)
