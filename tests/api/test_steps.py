"""The generator form: what it yields is what is logged; leaving the loop saves, and resuming continues bit for bit."""

import signal
import threading

import datasets
import pytest
import torch

import lowlevel as ll
from lowlevel.errors import ConfigError
from lowlevel.optim.train_state import StepResult
from lowlevel.running.endings import Interrupts


@pytest.fixture(scope="module")
def taken(api) -> list[StepResult]:
    return list(api.steps("taken", logging_steps=10))


def test_the_values_of_a_step_are_those_logged(taken, dpo):
    assert [step.step for step in taken] == [1, 2, 3, 4]
    for step, record in zip(taken, dpo.metrics, strict=True):
        assert (step.loss, step.grad_norm, step.learning_rate) == tuple(
            record[key] for key in ("loss", "grad_norm", "learning_rate")
        )
        assert all(record[name] == value for name, value in step.metrics.items())
        assert step.count == len(step.rows) == len(set(step.rows)) == 4
        for name in ("rewards/chosen", "rewards/margins", "logps/chosen", "logps/ref_rejected"):
            assert float(step.examples[name].double().mean()) == pytest.approx(record[name], rel=1e-6, abs=1e-6)
        assert float(step.examples["loss"].double().mean()) == pytest.approx(step.loss, abs=1e-6)
        assert not any(value.requires_grad for value in (*step.examples.values(), *step.tokens.values()))
    assert sum(step.num_tokens for step in taken) == dpo.metrics[-1]["num_tokens"]
    assert sum(step.supervised_tokens for step in taken) == dpo.metrics[-1]["supervised_tokens"]
    assert sorted(row for step in taken[:2] for row in step.rows) == list(range(8))


def test_the_tokens_of_a_step_add_up_to_its_log_probabilities(taken):
    step, tokens = taken[2], taken[2].tokens
    sums = step.examples["logps/chosen"] + step.examples["logps/rejected"]
    assert {len(value) for value in tokens.values()} == {step.supervised_tokens}
    for row, total in zip(step.rows, sums, strict=True):
        own = tokens["logps"][tokens["rows"] == row]
        assert float(own.sum()) == pytest.approx(float(total), abs=1e-4)
        reference = tokens["ref_logps"][tokens["rows"] == row]
        assert reference.shape == own.shape and not torch.equal(reference, own)


def test_the_tokens_of_sft(api, sft):
    (step,) = api.steps("sft-steps", sft.config.data.source, method="sft", max_steps=1, lr_scheduler_type="constant")
    assert step.count == step.supervised_tokens == len(step.tokens["logps"])
    assert step.loss == sft.metrics[0]["loss"]
    assert float(-step.tokens["logps"].double().mean()) == pytest.approx(step.loss, rel=1e-6)
    last = step.tokens["ids"][step.tokens["rows"] == step.rows[0]]
    assert len(last) > 1


def test_leaving_the_loop_saves_and_resuming_continues_bit_for_bit(api, dpo, taken, same, rows):
    """Also where the same rows come in another container."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    random = torch.manual_seed(7).get_state()
    for step in api.steps("left", logging_steps=10):
        if step.step == 1:
            break
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert torch.equal(torch.get_rng_state(), random)
    run = ll.Run(api.folder / "left", data=dpo.config.data.source)
    assert run.folder.read_state() == "stopped" and "step 1" in repr(run)
    assert (run.path / "step-00000001").exists() and not (run.path / "adapter").exists()
    assert isinstance(run.generate("Hello", max_new_tokens=2), str)  # with its newest checkpoint
    early = run.policy.flat.weights.clone()
    assert run.policy is run.policy
    with pytest.raises(ConfigError, match="resume"):
        next(api.steps("left"))
    with pytest.raises(ConfigError, match=r'allow_change=\["seed"\]: not changed since'):
        next(api.steps("left", resume=True, allow_change="seed"))
    again = datasets.Dataset.from_list(rows["dpo"])
    rest = [step.step for step in api.steps("left", again, logging_steps=10, resume=True)]
    assert rest == [2, 3, 4] and same(ll.Run(run.path), ll.Run(api.folder / "taken"))
    assert not torch.equal(run.policy.flat.weights, early), "those of the checkpoint that was loaded before"


def test_an_exception_in_the_loop_saves_too(api):
    with pytest.raises(ZeroDivisionError):
        for step in api.steps("raised"):
            print(1 // (2 - step.step))
    run = ll.Run(api.folder / "raised")
    assert run.folder.read_state() == "stopped" and (run.path / "step-00000002").exists()


def test_steps_taken_by_next_are_saved_when_the_program_ends(api, monkeypatch):
    monkeypatch.setattr("atexit.register", lambda *call: at_end.append(call))
    at_end: list[tuple] = []
    (api.folder / "next" / "wandb").mkdir(parents=True)
    first, second = api.steps("next", restart=True), api.steps("gone")
    next(first)
    assert (api.folder / "next" / "wandb").exists()  # no run was there to discard
    for leave, steps in at_end:
        leave(steps)
    run = ll.Run(api.folder / "next")
    assert run.folder.read_state() == "stopped" and (run.path / "step-00000001").exists()
    del first, second
    assert [steps() for _, steps in at_end] == [None, None]


def test_runs_taken_in_turns_give_the_signal_handler_back():
    before = signal.getsignal(signal.SIGINT)
    first, second = Interrupts(), Interrupts()
    for each in (first.__enter__, second.__enter__, first.__exit__):
        each()
    assert signal.getsignal(signal.SIGINT) == second.on_signal
    second.__exit__()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("surroundings", "text"),
    [
        (torch.no_grad, "gradients are off"),
        (torch.inference_mode, "gradients are off"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is on"),
        (lambda: torch.device("meta"), "the default device is meta"),
    ],
)
def test_settings_of_torch_that_a_run_does_not_expect_are_refused(api, surroundings, text):
    with surroundings(), pytest.raises(ConfigError, match=f"^torch: {text};"):
        next(api.steps("surrounded"))
    assert not (api.folder / "surrounded").exists()


def test_resuming_and_discarding_at_once_is_refused(api):
    with pytest.raises(ConfigError, match="give one of them"):
        next(api.steps("both", resume=True, restart=True))


@pytest.mark.parametrize("name", ["adapter", "model", "stacked"])
def test_a_folder_that_no_run_made_is_not_replaced(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"/{name} is not from a run, which would replace it"):
        next(ll.steps("sft", output_dir=tmp_path, restart=True))


def test_steps_in_a_thread(api, taken):
    found: list[float] = []

    def work():
        torch.set_num_threads(1)
        found.extend(step.loss for step in api.steps("thread"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [step.loss for step in taken]


def test_settings_are_checked_when_steps_is_called(tmp_path):
    with pytest.raises(ConfigError, match="max_steps"):
        ll.steps("dpo", max_step=3)
    ll.steps("dpo", output_dir=tmp_path / "a")
    assert not (tmp_path / "a").exists()
