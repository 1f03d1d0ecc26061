"""Two ranks that sample: the run is that of one rank, whichever of them fails, is slow, or has no reward."""

import time
from dataclasses import dataclass

import pytest
from workspace import run as command

from benchmarks.faulting.actions import Hang, Kill, Refuse, Signal
from benchmarks.faulting.calls import STEP, AtCall
from benchmarks.faulting.comparison import differences, fingerprint, litter, logged
from lowlevel.online.rollouts import KeptRollouts

SAMPLE = "lowlevel.online.steps:OnlineSteps.sample"
SCORE = "lowlevel.online.rewards:Rewards.__call__"
CALL = "lowlevel.online.rewards:limited"
UNLIKE = ("sampling_seconds", "rewarding_seconds", "ratio")
SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Wait:
    """Slower than train.ddp_timeout allows a rank to be silent, but it is not: it goes on."""

    seconds: float

    def __call__(self, where: str) -> None:
        time.sleep(self.seconds)


def made(stage, method="grpo", **own):
    """A run file of 4 steps: 3 prompts of 2 completions each, so that one rank has two prompts."""
    from benchmarks.faulting.stage import Case, Play

    space, case = stage.workspace, Case(method, accumulation=3)
    name = "-".join([method, *own])
    own = {"num_generations": 2, "max_completion_length": 8, "reward": "format", "reward_pattern": ".*[a-m].*", **own}
    data = {"source": str(space.sft_rows), "format": "auto", "eval_source": "holdout", "eval_limit": 3}
    train = {"gradient_accumulation_steps": 3, "logging_steps": 1, "save_steps": 1, "max_steps": 4}
    path = space.write(name, method, data=data, train=train, **{method: own})
    return Play(stage, case, path)


def run(play, folder, faults=None, size=2):
    """Start or resume; the codes, the lines of errors, and all that the first rank printed."""
    from benchmarks.faulting.ranks import Together

    ended = Together(play, folder, faults, size=size).wait()
    lines = [line for one in ended for line in one.err.splitlines() if "error:" in line or "stopped" in line]
    assert not any("Traceback" in one.said for one in ended), ended
    return [one.code for one in ended], lines, ended[0].out


@pytest.fixture(scope="module")
def two(stage):
    play = made(stage, num_iterations=2, reward_timeout=1.0)
    folder = play.new()
    assert run(play, folder)[0] == [0, 0]
    return play, folder


def close(folder, other):
    pairs = zip(logged(folder), logged(other), strict=True)
    for now, then in [[{k: v for k, v in one.items() if k not in UNLIKE} for one in pair] for pair in pairs]:
        assert now == {key: pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True) for key, value in then.items()}


def test_the_run_is_that_of_one_rank(two):
    """Completions too: what is drawn does not depend on the rank. Its folder opens on one process."""
    play, folder = two
    assert play.run(alone := play.new(), more=()).code == 0
    close(folder, alone)
    for step in (1, 3):
        both = zip(*(KeptRollouts(each).read(step) for each in (folder, alone)), strict=True)
        pairs = [[(x.group, x.sample, x.completion_ids.tolist(), x.reward) for x in pair] for pair in both]
        assert len(pairs) == 6 and all(one == other for one, other in pairs)
        assert len({x[3] for x, _ in pairs}) == 2  # something is learned
    said = command("replay", folder, "--step", 4)
    assert said.code == 0 and "added on 2 GPUs" not in said.out, said.out + said.err  # every number is identical


@SLOW
def test_other_commands_on_one_process(two):
    for words in (("verify", two[1], "--step", 3), ("inspect", two[1], "--step", 4), ("report", two[1])):
        said = command(*words)
        assert said.code == 0, said.out + said.err
    assert "GPUs" in (two[1] / "report.html").read_text()


@SLOW
@pytest.mark.parametrize(
    ("method", "own"), [("rloo", {"beta": 0.1}), ("ppo", {"beta": 0.1}), ("online_dpo", {"num_iterations": 2})]
)
def test_the_other_methods(stage, method, own):
    play = made(stage, method, **own)
    folder, alone = play.new(), play.new()
    assert run(play, folder)[0] == [0, 0] and play.run(alone, more=()).code == 0
    close(folder, alone)


@SLOW
def test_a_reward_that_fails_on_one_rank_is_counted_and_named_as_on_one(stage, two):
    """The only prompt of rank 1 in step 1, after its held-out one, is the second of the step."""
    play, folders, said = made(stage), [two[0].new(), two[0].new()], list[str]()
    for folder, faults in zip(folders, ({1: AtCall(CALL, (2,), Refuse("EIO"))}, None), strict=True):
        if faults:
            codes, _, out = run(play, folder, faults)
        else:
            ended = play.run(folder, AtCall(CALL, (5,), Refuse("EIO")), more=())
            codes, out = [ended.code, 0], ended.out
        assert codes == [0, 0], out
        said += [line for line in out.splitlines() if "no reward" in line]
    assert len(said) == 2 and said[0] == said[1] and "step 1: no reward: chats.jsonl:" in said[0]
    assert "format: OSError" in said[0] and logged(folders[0])[1]["rewards/failed"] == 2
    close(*folders)


SILENT = "rank 1 hangs at step 3: no answer for 5 s (train.ddp_timeout + grpo.reward_timeout)"
FAULTS = {  # by rank: the fault, the exit codes, and words of the one message
    "killed while it samples": (1, AtCall(SAMPLE, (3,), Kill()), [1, -9], "rank 1 was killed at step"),
    "first killed while it rewards": (0, AtCall(SCORE, (6,), Kill()), [-9, 1], "rank 0 was killed at step"),
    "hangs while it samples": (1, AtCall(SAMPLE, (3,), "hang"), [1, -9], SILENT),
    "stopped while it rewards": (1, AtCall(SCORE, (3,), Signal(15)), [143, 143], "stopped at step 3 of 4 and saved"),
}


@SLOW
@pytest.mark.parametrize("fault", FAULTS)
def test_one_message_and_the_same_run_afterwards(two, tmp_path, fault):
    play, whole = two
    rank, at, codes, words = FAULTS[fault]
    at = AtCall(at.target, at.numbers, Hang(tmp_path / "sign")) if at.action == "hang" else at
    ended, said, _ = run(play, folder := play.new(), {rank: at})
    assert (ended, len(said)) == (codes, 1) and words in said[0], (ended, said)
    assert run(play, folder)[0] == [0, 0] and litter(folder) == []
    unlike = [name for name in differences(folder, fingerprint(whole)) if not name.startswith(("logged", "state"))]
    assert unlike == []
    close(folder, whole)


def test_the_others_end_while_they_are_at_work(two):
    """A rank in no collective does not go on for long after another was killed."""
    play, _ = two
    faults = {0: AtCall(SCORE, (5,), Wait(60.0)), 1: AtCall(SAMPLE, (3,), Kill())}
    started = time.monotonic()
    ended, said, _ = run(play, play.new(), faults)
    assert ended == [1, -9] and len(said) == 1 and "rank 1 was killed" in said[0]
    assert time.monotonic() - started < 40


@SLOW
def test_a_slow_rank_does_not_hang(stage):
    """Of 4 + 1 s for a sign of life it needs 3 for each of two prompts, while the other rank waits."""
    play = made(stage, reward_timeout=1.0)
    codes, said, _ = run(play, play.new(), {0: AtCall(SCORE, (3, 4), Wait(3.0))})
    assert (codes, said) == ([0, 0], [])


@SLOW
@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_ranks_goes_on_with_the_run(two, first):
    """In the middle of two steps on the same completions."""
    play, whole = two
    folder, stop = play.new(), AtCall(STEP, (3,), Signal(15))
    if first == 2:
        assert run(play, folder, {1: stop})[0] == [143, 143] and play.run(folder).code == 0
    else:
        assert play.run(folder, stop, more=()).code == 143 and run(play, folder)[0] == [0, 0]
    close(folder, whole)
