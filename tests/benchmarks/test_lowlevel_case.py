"""The benchmark's way of running lowlevel: the real training run, with a meter beside it."""

from workspace import make_workspace

from benchmarks.lowlevel_case import run_metered
from benchmarks.meter import Meter
from lowlevel.config.file import load_config


def test_a_metered_run_is_a_run_with_the_time_of_each_step(tmp_path):
    space = make_workspace(tmp_path)
    config = load_config(space.write("metered", "sft", train={"logging_steps": 1, "max_steps": 3}))
    meter = Meter()
    records, mode = run_metered(config, meter)
    assert [record["step"] for record in records] == [1, 2, 3] and all(record["loss"] > 0 for record in records)
    assert mode == "eager"
    assert len(meter.seconds) == 3 and min(meter.seconds) > 0
