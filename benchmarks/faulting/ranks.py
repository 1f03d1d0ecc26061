"""Several ranks of one run: processes of the fork server, and the store that torchrun would keep for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from benchmarks.faulting.processes import Ended, Fault, Started
from benchmarks.faulting.stage import Play


def keep_store() -> TCPStore:
    """A store in this process, on a free port; it lives as long as what is returned."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@dataclass(frozen=True)
class AsRank:
    """What torchrun sets for a process."""

    rank: int
    size: int
    port: int

    def install(self, folder: Path) -> None:
        """See Fault."""
        one_machine = {"LOCAL_RANK": self.rank, "LOCAL_WORLD_SIZE": self.size, "TORCHELASTIC_USE_AGENT_STORE": True}
        found = {"RANK": self.rank, "WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        os.environ.update({name: str(value) for name, value in (found | one_machine).items()})


class Together:
    """A run in several processes."""

    def __init__(
        self,
        play: Play,
        folder: Path,
        faults: Mapping[int, Fault] | None = None,
        more: Sequence[str] = (),
        size: int = 2,
    ) -> None:
        """Start it; `faults` by rank. The output of each is beside the folder."""
        self.store, self.processes = keep_store(), list[Started]()
        arguments = play.arguments(folder, "--resume", "--train.ddp_timeout", "4", *more)
        for rank in range(size):
            own = [fault for number, fault in (faults or {}).items() if number == rank]
            place = folder.parent / f"rank{rank}" / folder.name  # its streams and marks; the run folder is `folder`
            place.parent.mkdir(exist_ok=True)
            told = (*play.case.always, AsRank(rank, size, self.store.port), *own)
            self.processes.append(Started(arguments, place, told))

    def wait(self) -> list[Ended]:
        """The end of each rank."""
        return [process.wait() for process in self.processes]


def at_once(work: Callable[..., Any], size: int, *arguments: Any) -> None:
    """Call `work(*arguments)` in `size` ranks.

    Raises RuntimeError if one of them fails.
    """
    import multiprocessing

    from benchmarks.faulting.processes import ONE, start_server

    start_server()
    store, context = keep_store(), multiprocessing.get_context("forkserver")
    with ONE:
        processes = [
            context.Process(target=_as_rank, args=(AsRank(rank, size, store.port), work, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
    if codes := [process.exitcode for process in processes if process.exitcode != 0]:
        raise RuntimeError(f"ranks ended with {codes}")


def _as_rank(rank: AsRank, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    rank.install(Path())
    work(*arguments)
