"""The empty callback has every moment and does nothing."""

from pathlib import Path

from lowlevel.running.callbacks import Callback


def test_a_callback_that_overrides_nothing_accepts_every_moment():
    callback = Callback()
    callback.on_step(1)
    callback.on_log({"step": 1, "loss": 0.5})
    callback.on_evaluate({"step": 0, "eval_loss": 0.5})
    callback.on_save(Path("out/run/step-00000001"))
    callback.on_end(None)
