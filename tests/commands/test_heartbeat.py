"""Long work prints a line before 10 s are over; the clock is a test's own, and nothing sleeps."""

import io
import threading

import pytest
from rich.console import Console
from workspace import HELD_OUT

import lowlevel.heartbeat as heart
from lowlevel.errors import how_many
from lowlevel.heartbeat import Heartbeat, Work, counted, duration, heartbeat, working
from lowlevel.running.progress import TrainingProgress, speaking


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (Work("loading demo"), "loading demo: 30 s"),
        (Work("rows", total=4000, unit="rows", done=1000), "rows: 1,000 of 4,000 rows, 30 s, about 90 s left"),
        (Work("training", total=40, unit="steps"), "training: 0 of 40 steps, 30 s"),
        (Work("this step", total=1, unit="micro-batches"), "this step: 0 of 1 micro-batch, 30 s"),
        (Work("training", total=40, first=10, done=10), "training: 10 of 40, 30 s"),
        (Work("training", total=40, first=10, done=11), "training: 11 of 40, 30 s, about 14 min left"),
    ],
)
def test_a_line_has_what_is_done_and_the_time_left_as_soon_as_it_is_known(work, line):
    assert work.line(30.0) == line


def test_durations_have_two_digits():
    assert [duration(s) for s in (0.4, 99.4, 130, 5900, 12_000)] == ["0 s", "99 s", "2 min", "98 min", "3 h 20 min"]


@pytest.mark.parametrize(
    ("things", "one"),
    [("rows", "1 row"), ("micro-batches", "1 micro-batch"), ("better replies", "1 better reply")],
)
def test_one_thing_is_no_plural(things, one):
    assert [how_many(count, things) for count in (0, 1, 2048)] == [f"0 {things}", one, f"2,048 {things}"]


def test_a_line_is_due_when_ten_seconds_would_pass_without_one():
    clock, said = Clock(), []
    beat = Heartbeat(said.append, "lowlevel sft", clock)
    outer, inner = Work("training", 100.0, 4, "steps", done=1), Work("evaluating", 100.0)
    beat.works += [outer, inner]
    for seconds in (5, 8.9, 9.5, 10, 18):
        clock.now = 100 + seconds
        beat.poll()
    line = "training: 1 of 4 steps, 10 s, about 28 s left; evaluating: 10 s"
    assert said == [line]
    beat.spoke()  # a logged step was printed: at 18 s
    clock.now = 126
    beat.poll()
    assert len(said) == 1
    with beat.pause():
        clock.now = 200
        beat.poll()
    assert len(said) == 1
    beat.works.remove(inner)
    clock.now = 210
    beat.poll()
    assert said[1].startswith("training: 1 of 4 steps, 2 min")


def test_a_command_without_a_name_for_its_work_says_what_it_imports(monkeypatch, tmp_path):
    clock, said = Clock(), []
    beat = Heartbeat(said.append, "lowlevel sft", clock)
    (tmp_path / "slow_library.py").write_text("import inner_library")
    (tmp_path / "inner_library.py").write_text("from lowlevel.heartbeat import _active\n_active.get().poll()")
    monkeypatch.syspath_prepend(tmp_path)
    token = heart._active.set(beat)
    clock.now = 110
    import slow_library  # noqa: F401

    heart._active.reset(token)
    clock.now = 120
    beat.poll()
    assert said == ["lowlevel sft: 10 s, importing slow_library", "lowlevel sft: 20 s"]


def test_the_thread_ends_with_the_block_and_one_heartbeat_is_enough(monkeypatch):
    monkeypatch.setattr(heart, "INTERVAL", 0.0)
    monkeypatch.setattr(heart, "POLL", 0.01)
    spoken, lines = threading.Event(), []

    def say(line):
        lines.append(line)
        spoken.set()

    with pytest.raises(KeyboardInterrupt), heartbeat(say, "outer") as beat:
        with heartbeat(pytest.fail, "inner") as same, working("waiting"):
            assert same is beat and spoken.wait(5)
        raise KeyboardInterrupt
    assert lines[0].startswith("waiting: ") and not [t for t in threading.enumerate() if t.name == "heartbeat"]
    with working("no heartbeat"):
        assert list(counted("rows", [1, 2])) == [1, 2]


@pytest.mark.parametrize(("keys", "on"), [({}, False), ({"force_terminal": True}, True)])
def test_beside_the_bar_of_a_terminal_no_line_is_due(keys, on):
    with speaking(console := Console(file=io.StringIO(), **keys), "sft") as beat:
        with TrainingProgress(console, "sft", 8, 2):
            with beat.pause():
                pass
            assert beat.paused is on
        assert not beat.paused
    with speaking(Console(quiet=True), "sft"):
        assert heart._active.get() is None


def test_a_printed_step_counts_as_a_line():
    with heartbeat(print, "sft") as beat, TrainingProgress(Console(file=io.StringIO()), "sft", 8, 2) as bar:
        beat.spoken = -100.0
        bar.step(3)
        bar.record({"step": 3, "loss": 1.0})
        assert beat.spoken > 0 and (beat.works[-1].first, beat.works[-1].done) == (2, 3)


@pytest.fixture
def named(monkeypatch):
    """What every piece of work was called in this test."""
    names: list[str] = []

    class Recorded(Heartbeat):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.works = Works(self.works)

    class Works(list):
        def append(self, work):
            names.append(work.what)
            super().append(work)

    monkeypatch.setattr(heart, "Heartbeat", Recorded)
    return names


def test_each_long_part_of_a_run_has_a_name(runs, cli, tmp_path, named):
    data = {"eval_source": "holdout", "eval_limit": HELD_OUT}
    config = runs.space.write("named", "sft", folder=tmp_path, data=data, train={"max_steps": 1})
    assert cli("sft", config).code == 0
    before = [f"reading {runs.space.sft_rows}", "tokenising", "tokenising", f"loading {runs.space.base}"]
    assert named == [*before, "dequantising the base", "training", "evaluating", "this step", "evaluating"]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (("verify", "--exact-parameters", 0), {"tokenising", "verifying"}),
        (("replay", "--step", 1), {"tokenising", "replaying"}),
        (("compare", "--prompts", 1, "--max-new-tokens", 1), {"tokenising", "scoring held-out rows", "generating"}),
    ],
)
def test_each_long_part_of_looking_at_a_run_has_a_name(runs, cli, named, command, names):
    said = cli(command[0], runs.sft, *command[1:])
    assert said.code == 0, said.err
    assert {*names, f"loading {runs.space.base}"} <= set(named)
