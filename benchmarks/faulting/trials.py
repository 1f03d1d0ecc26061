"""One fault each: do it, look at what it left, resume, and compare with the uninterrupted run.

Every trial returns what is wrong, a line each; an empty list is a run that survived.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.faulting.actions import Kill, LimitFileSize, OutOfMemory, Refuse, Signal, came
from benchmarks.faulting.calls import STEP, AtCall, NotFinite
from benchmarks.faulting.comparison import differences, litter, newest_good, status, tensor_hashes
from benchmarks.faulting.damage import FILES, damage, flip
from benchmarks.faulting.operations import AtFile, AtOperation
from benchmarks.faulting.processes import Ended, Fault
from benchmarks.faulting.stage import Play
from lowlevel.checkpoints.checkpoint import checkpoints


def expect(ended: Ended, *codes: int) -> list[str]:
    """Another exit code, or a traceback, is a problem."""
    problems = [] if ended.code in codes else [f"exit {ended.code}, not {codes}: {ended.said.strip()[-300:]}"]
    return problems + (["a traceback was printed"] if "Traceback (most recent" in ended.said else [])


def killed_at(play: Play, change: int, *, of: Path | None = None, damage: bool = False) -> list[str]:
    """SIGKILL before change number `change` of a new run, or of one that goes on from the folder `of`.

    `damage`: `of` holds a damaged checkpoint, so that more than one step may have to be taken again.
    """
    folder = play.copy(of) if of else play.new()
    ended = play.run(folder, AtOperation(change, Kill()))
    return expect(ended, -9) + play.lost(folder, damage=damage) + play.resumed(folder)


def killed_at_random(play: Play, rng: random.Random, kills: int) -> tuple[int, list[str]]:
    """SIGKILL from outside, `kills` times in a row on one run, each at a random instant; how many of them hit."""
    folder, hits, problems = play.new(), 0, []
    for _ in range(kills):
        started = play.start(folder)
        time.sleep(rng.uniform(0.0, play.whole.ended.seconds))
        started.kill()
        code = started.wait().code
        hits += code == -signal.SIGKILL
        problems += [] if code in (0, -signal.SIGKILL) else [f"ended with {code} by itself"]
        problems += play.lost(folder)
    return hits, problems + play.resumed(folder)


def rank_killed(play: Play, rank: int, instant: float, wanted: dict[str, Any]) -> tuple[int, list[str]]:
    """SIGKILL to one of two ranks after `instant` seconds: the other one ends and tells; resumed, the run ends as
    `wanted`, the fingerprint of one that was not disturbed. Also whether the kill came in time.
    """
    from benchmarks.faulting.ranks import Together

    folder = play.new()
    both = Together(play, folder)
    time.sleep(instant)
    both.processes[rank].kill()
    ends = both.wait()
    other, hit = ends[1 - rank], ends[rank].code == -signal.SIGKILL
    problems = play.lost(folder)
    told = (f"rank {rank} was killed", f"rank {rank} did not start")
    if hit and other.code == 1 and not any(words in other.err for words in told):
        problems.append(f"rank {1 - rank} said: {other.said.strip()[-300:]}")
    if hit and other.code not in (0, 1):
        problems.append(f"rank {1 - rank} ended with {other.code}: {other.said.strip()[-300:]}")
    again = Together(play, folder).wait()
    problems += [f"resume: {one.code} {one.said.strip()[-300:]}" for one in again if one.code]
    problems += [f"differs: {name}" for name in differences(folder, wanted)]
    return hit, problems + [f"left over: {name}" for name in litter(folder)]


def refused(play: Play, change: int, error: str, *, for_good: bool = False) -> list[str]:
    """The disk refuses change number `change`, or with `for_good` that one and all later ones; then it works again."""
    folder, action = play.new(), Refuse(error)
    ended = play.run(folder, AtOperation(change, action, 10**9 if for_good else None))
    problems = expect(ended, 4) + play.lost(folder)
    if action.text not in ended.err:
        problems.append(f"{action.text!r} is not in: {ended.err.strip()[-300:]}")
    if not for_good:
        # a half-deleted old checkpoint stays where the disk refuses to delete it, until the next start
        problems += [f"left over: {name}" for name in litter(folder) if not name.startswith(".del-")]
        problems += _status(folder, "failed", 4)
    return problems + play.resumed(folder)


def disk_full(play: Play, file: str, step: int) -> list[str]:
    """The kernel stops a file of a step's checkpoint half-way, as a full disk does; then there is room."""
    whole = play.whole.folder / f"step-{play.whole.steps:08d}" / file
    kind = "tensors" if file.endswith("safetensors") else "open"
    place = rf"{kind} \.tmp-step-{step:08d}/{file}".replace(".json", r"\.json")
    folder = play.new()
    ended = play.run(folder, AtFile(place, LimitFileSize(whole.stat().st_size // 2)))
    problems = expect(ended, 4) + play.lost(folder) + [f"left over: {name}" for name in litter(folder)]
    problems += [] if "File too large" in ended.err else [f"no reason in: {ended.err.strip()[-300:]}"]
    problems += [] if newest_good(folder) == step - 1 else [f"newest checkpoint is of step {newest_good(folder)}"]
    return problems + play.resumed(folder)


def hurt(play: Play, stopped: Path, number: int, rng: random.Random) -> tuple[str, list[str]]:
    """Damage the newest checkpoint of a copy of `stopped`: what was done, and what is wrong after a resume."""
    folder = play.copy(stopped)
    newest = f"step-{newest_good(folder):08d}"
    before = _content(folder / newest)
    what = damage(folder / newest, number, rng)
    # A file of a checkpoint's name is no checkpoint, so nothing has to be said of it.
    is_one = (folder / newest).is_dir()
    noticed = newest_good(folder) < int(newest.removeprefix("step-"))
    harmless = _content(folder / newest) == before
    ended = play.run(folder)
    problems = expect(ended, 0)
    if not (noticed or harmless):
        problems.append("not noticed")
    if is_one and noticed and ("skipped a damaged checkpoint" not in ended.out or newest not in ended.out):
        problems.append("no word of the damage")
    if ended.code == 0:
        problems += play.compared(folder)
    shutil.rmtree(folder.parent)
    return what, [f"{what}: {problem}" for problem in problems]


def signalled(play: Play, fault: Fault, number: int, *, twice: bool = False) -> list[str]:
    """A signal inside; with `twice` `fault` sends a second one, and the process may stop where it is."""
    folder = play.new()
    ended = play.run(folder, fault)
    problems = expect(ended, 128 + number, *(() if twice else (0,))) + play.lost(folder)
    if came(folder) < 1 + twice:
        problems.append(f"only {came(folder)} signals came")
    if twice and "stopped at step" in ended.err:
        problems.append("the second signal did not end the process at once")
    if not twice:
        problems += [f"left over: {name}" for name in litter(folder)]
        problems += _status(folder, "finished" if ended.code == 0 else "stopped", ended.code)
    return problems + play.resumed(folder)


def not_finite(play: Play, fault: NotFinite) -> list[str]:
    """A number that is none: exit 5 (4 where weights are to be saved), the last good checkpoint untouched."""
    folder = play.stopped_at(fault.step - 1)
    last = folder / f"step-{fault.step - 1:08d}"
    before = {file: tensor_hashes(last / file) for file in ("adapter_model.safetensors", "optimizer.safetensors")}
    ended = play.run(folder, fault)
    problems = expect(ended, 4 if fault.what == "weights" else 5) + _status(folder, "failed", ended.code)
    wanted = [f"step {fault.step}", *(["data rows ["] if fault.what != "weights" else [])]
    problems += [f"{text!r} is not in: {ended.err.strip()[-300:]}" for text in wanted if text not in ended.err]
    if newest_good(folder) != fault.step - 1 or any(tensor_hashes(last / file) != before[file] for file in before):
        problems.append("the last good checkpoint has changed")
    return problems + play.resumed(folder)


def stopped_after(play: Play, steps: Iterable[int]) -> list[str]:
    """SIGTERM in each of these steps (ascending, from 1) of one run, each time resumed in a new process."""
    folder, problems, taken = play.new(), [], 0
    for step in steps:
        ended = play.run(folder, AtCall(STEP, (step - taken,), Signal(signal.SIGTERM)))
        taken = step
        problems += expect(ended, 128 + signal.SIGTERM) + _status(folder, "stopped", 128 + signal.SIGTERM)
        if newest_good(folder) != step:
            problems.append(f"stopped in step {step}, newest checkpoint is of step {newest_good(folder)}")
    return problems + play.resumed(folder)


def stopped_once(play: Play, step: int) -> list[str]:
    """SIGTERM in one step, then resumed to the end."""
    return play.resumed(play.stopped_at(step))


def all_damaged(play: Play, stopped: Path, number: int, rng: random.Random) -> list[str]:
    """Damage to every checkpoint: exit 4 with each of them named, nothing trained, nothing lost."""
    folder = play.copy(stopped)
    names = [path.name for path in checkpoints(folder)]
    for name in names:
        flip(folder / name / FILES[number % len(FILES)], rng)
    ended = play.run(folder)
    problems = expect(ended, 4) + [f"{name} is not named" for name in names if name not in ended.err]
    if [path.name for path in checkpoints(folder)] != names:
        problems.append("checkpoints were deleted or written")
    return problems


def out_of_memory(play: Play, target: str, number: int) -> list[str]:
    """torch's OutOfMemoryError at a call: exit 6, with the setting to turn down."""
    folder = play.new()
    ended = play.run(folder, AtCall(target, (number,), OutOfMemory()))
    problems = expect(ended, 6) + play.lost(folder) + _status(folder, "failed", 6)
    if "per_device_train_batch_size" not in ended.err:
        problems.append(f"no setting to turn in: {ended.err.strip()[-300:]}")
    return problems + play.resumed(folder)


def _status(folder: Path, state: str, code: int) -> list[str]:
    """run-status.json says so, if the run got as far as having one."""
    found = status(folder)
    if not found or (found["state"], found["exit"]) == (state, code):
        return []
    return [f"status is {found['state']}, exit {found['exit']}; expected {state}, {code}"]


def _content(checkpoint: Path) -> dict[str, object]:
    """What a checkpoint's files hold: a manifest by its values, since "1e-05" and "1E-05" are one number."""
    found: dict[str, object] = {}
    for path in checkpoint.iterdir() if checkpoint.is_dir() else ():
        plain = path.is_file() and not path.is_symlink()
        found[path.name] = path.read_bytes() if plain else None
        if plain and path.name == "manifest.json":
            with suppress(ValueError):
                found[path.name] = json.loads(path.read_bytes())
    return found
