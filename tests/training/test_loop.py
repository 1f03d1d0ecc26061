"""The loop's bookkeeping with a clock that is under control: what is logged, when, and how fast it says it was."""

from types import SimpleNamespace

import pytest
import torch
from helpers import step_result

from lowlevel import loop
from lowlevel.config.schema import TrainConfig
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.train_state import TrainState


class Recorder:
    """An observer that keeps what it is told; asks to stop after step `stop_after`."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.step = stop_after, 0
        self.records: list[dict] = []
        self.saved: list[dict] = []

    def log(self, record):
        self.records.append(record)

    def progress(self, state, result):
        self.step = state.step

    def save(self, state):
        self.saved.append(state.to_json())

    def stop_requested(self):
        return 15 if self.step == self.stop_after else 0


@pytest.fixture
def go(monkeypatch):
    """Train without a model: step n takes 2 s and has n + 1 tokens, loss and reward 10 n; an evaluation takes 50 s."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock.now)

    def step(_, optimizer, *__, step, **___):
        clock.now += 2
        count = step + 1
        loss, rate = {"loss": 10.0 * step, "reward": 10.0 * step}, optimizer.param_groups[0]["lr"]
        return step_result(loss, count, grad_norm=1.0 + step, rate=rate, examples=2, tokens=count, positions=2 * count)

    monkeypatch.setattr(loop, "optimizer_step", step)

    def run(state=None, *, scores=(), stop_after=None, total=12, **config):
        observer, state = Recorder(stop_after), state or TrainState(LossScale.for_precision("fp32"))
        scores = iter(scores)

        def evaluate():
            clock.now += 50
            return {"eval_loss": next(scores)}

        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        evaluation = evaluate if config.pop("evaluates", False) else None
        settings = TrainConfig(learning_rate=1.0, lr_scheduler_type="constant", **config)
        execution = SimpleNamespace(policy=SimpleNamespace(move_reference=lambda step: None))
        steps = loop.train(
            *(execution, optimizer, state, lambda step: [], evaluation, observer, settings),
            total_steps=total,
            steps_per_epoch=4,
        )
        for _ in steps:
            pass
        clock.now += 1000  # until the process starts again
        return state, observer

    return run


def training_records(observer):
    return [record for record in observer.records if "loss" in record]


def test_logged_losses_weigh_steps_by_their_tokens(go):
    state, observer = go(logging_steps=5)
    assert [r["step"] for r in observer.records] == [5, 10, 12]  # the last step is logged, due or not
    first = sum(10 * n * (n + 1) for n in range(5)) / 15
    assert observer.records[0]["loss"] == pytest.approx(first)
    assert observer.records[2]["loss"] == pytest.approx((100 * 11 + 110 * 12) / 23)
    assert [r["reward"] for r in observer.records] == [20, 70, 105], "a mean over steps: each has as many completions"
    assert [r["grad_norm"] for r in observer.records] == [5, 10, 12]
    assert [r["epoch"] for r in observer.records] == [1.25, 2.5, 3.0]
    assert [r["num_tokens"] for r in observer.records] == [15, 55, 78]
    assert state.total.means()["loss"] == pytest.approx(sum(10 * n * (n + 1) for n in range(12)) / 78)
    assert (state.step, state.examples) == (12, 24) and len(observer.saved) == 1


def test_speed_counts_training_time_and_nothing_else(go):
    expected = [15 / 10, 40 / 10, 23 / 4]
    state, observer = go(logging_steps=5)
    assert [r["tokens_per_second"] for r in observer.records] == pytest.approx(expected)
    assert state.seconds == 24


@pytest.mark.parametrize("eval_steps", [5, 3, 4])
def test_an_evaluation_between_logged_steps_does_not_change_the_speed(go, eval_steps):
    state, observer = go(logging_steps=5, eval_steps=eval_steps, evaluates=True, scores=range(99))
    assert [r["tokens_per_second"] for r in training_records(observer)] == pytest.approx([15 / 10, 40 / 10, 23 / 4])
    assert state.seconds == 24


@pytest.mark.parametrize("stop", [5, 7, 11])
def test_a_resume_between_logged_steps_does_not_change_the_speed(go, stop):
    _, whole = go(logging_steps=5)
    state, first = go(logging_steps=5, stop_after=stop)
    assert state.step == stop and len(first.saved) == 1
    state, second = go(TrainState.from_json(first.saved[0]), logging_steps=5)
    assert first.records + second.records == whole.records
    assert state.seconds == 24


def test_saves_and_stops(go):
    _, observer = go(save_steps=5)
    assert [saved["step"] for saved in observer.saved] == [5, 10, 12]
    state, observer = go(save_steps=5, stop_after=10)
    assert state.step == 10 and [saved["step"] for saved in observer.saved] == [5, 10]


def test_early_stopping_counts_evaluations_without_a_gain(go):
    scores = [3.0, 2.0, 2.0, 1.9, 2.5, 2.4, 1.0]
    state, observer = go(eval_steps=1, early_stopping_patience=2, evaluates=True, scores=scores)
    assert state.step == 6 and state.stopped_early and state.best_eval_loss == 1.9
    assert [saved["step"] for saved in observer.saved] == [6]
    state, again = go(TrainState.from_json(observer.saved[0]), eval_steps=1, early_stopping_patience=2, evaluates=True)
    assert state.step == 6 and not again.records, "a run that has stopped stays stopped"
