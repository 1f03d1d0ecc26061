"""Callbacks are called in order with what the run writes; their exceptions end the run."""

import json

import pytest

import lowlevel as ll


class Recorder(ll.Callback):
    def __init__(self):
        self.seen = []

    def on_step(self, step):
        self.seen.append(("step", step.step, step))

    def on_log(self, record):
        self.seen.append(("log", record["step"], dict(record)))

    def on_evaluate(self, scores):
        self.seen.append(("evaluate", scores["step"], dict(scores)))

    def on_save(self, path):
        assert (path / "adapter_model.safetensors").exists()
        self.seen.append(("save", int(path.name.removeprefix("step-")), path))

    def on_end(self, run):
        self.seen.append(("end", max(record["step"] for record in run.metrics), run))


def test_every_moment_in_order_with_its_values(api):
    first, second = Recorder(), Recorder()
    settings = {"eval_data": "holdout", "eval_limit": 2, "eval_steps": 2}
    run = api.dpo("moments", callbacks=[first, second], logging_steps=2, **settings)
    expected = [("evaluate", 0), ("step", 1)]
    for step in (2, 4):
        expected += [("step", step), ("log", step), ("evaluate", step), ("save", step), ("step", step + 1)]
    expected[-1] = ("end", 4)
    assert [entry[:2] for entry in first.seen] == expected == [entry[:2] for entry in second.seen]
    assert [value for kind, _, value in first.seen if kind in ("log", "evaluate")] == run.metrics
    steps = {number: value for kind, number, value in first.seen if kind == "step"}
    assert steps[2].grad_norm == run.metrics[1]["grad_norm"]
    total = sum(steps[number].loss * steps[number].count for number in (1, 2))
    assert run.metrics[1]["loss"] == pytest.approx(total / (steps[1].count + steps[2].count), rel=1e-6)
    assert steps[3].examples["rewards/margins"].shape == (len(steps[3].rows),)
    assert str(first.seen[-1][2].path) == str(run.path)
    compared = run.compare(prompts=1, max_new_tokens=2, show=0)["scores"]["dpo"]
    assert compared["reward_accuracy"] == run.metrics[-1]["eval_rewards/accuracies"]


def test_without_callbacks_nothing_of_a_step_is_kept(api, dpo, same):
    assert same(api.dpo("observed", callbacks=[Recorder()]), dpo)


@pytest.mark.parametrize("callbacks", [Recorder(), [Recorder], [lambda step: None]])
def test_what_is_no_list_of_callbacks_is_refused(api, callbacks):
    with pytest.raises(ll.LowlevelError, match=r"callbacks: expected a list of lowlevel\.Callback objects, got"):
        api.dpo("uncalled", callbacks=callbacks)
    assert not (api.folder / "uncalled").exists()


@pytest.mark.parametrize("moment", ["on_step", "on_log", "on_save"])
def test_an_exception_in_a_callback_fails_the_run(api, moment):
    class Failing(ll.Callback):
        pass

    def fail(self, value):
        raise ZeroDivisionError("of mine")

    setattr(Failing, moment, fail)
    with pytest.raises(ZeroDivisionError, match="of mine"):
        api.dpo(f"failing-{moment}", callbacks=[Failing()], max_steps=2)
    folder = api.folder / f"failing-{moment}"
    status = json.loads((folder / "run-status.json").read_text())
    assert status["state"] == "failed" and "ZeroDivisionError: of mine" in json.dumps(status)
    assert not (folder / "adapter").exists()
    if moment == "on_save":
        run = api.dpo(f"failing-{moment}", max_steps=2, resume=True)  # as after any failure
        assert run.folder.read_state() == "finished"
