"""Several GPUs: one process (a rank) each under torchrun, which share the micro-batches of a step.

Every rank derives all micro-batches of a step from the data order, so it knows the step's count without asking, and
takes its own: the longest first, each to the rank with the least load. The gradient of rank r is

    g_r = sum over its micro-batches of scale / count * (gradient of the summed loss)          g = sum_r g_r

so one all-reduce of the flat gradient, with the sums of loss and metrics appended, gives on each rank what one GPU
computes, up to the order of additions (1e-6 in fp32). An inf or NaN of one rank is in every rank's sum, so all of them
skip the step, or stop. Everything that follows is the same arithmetic on the same bits on every rank.

An online method first needs completions: each rank samples and rewards those of every size-th prompt, and `collect`
gives all of them to every rank. From there on they are the examples of a step like any others.

The number of ranks is not a setting of a run: a step has per_device_train_batch_size x gradient_accumulation_steps
examples with any number. Rank 0 writes the run folder; the others write nothing.

Only launching.py also uses torch.distributed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.packing import divide
from lowlevel.errors import ConfigError, RankError
from lowlevel.hashing import checksum
from lowlevel.losses import LossSums
from lowlevel.losses.sums import LARGEST
from lowlevel.model.flat import FlatParameters
from lowlevel.running.endings import Interrupts
from lowlevel.watch import Watch

Result = TypeVar("Result")
_MORE = 60.0  # seconds that gloo and NCCL wait beyond train.ddp_timeout: the watch is to speak first


@dataclass(frozen=True)
class Share:
    """A rank's part of a list of micro-batches."""

    numbers: tuple[int, ...]  # places in the list, ascending
    batches: Sequence[PackedBatch]  # those, and others whose results do not count: an idle rank has the first

    @property
    def idle(self) -> bool:
        """Whether there are fewer micro-batches than ranks, and none for this one."""
        return not self.numbers


@dataclass(eq=False)
class Ranks:
    """This process among those that share a run. By default it is alone, and nothing here costs anything.

    Attributes:
        rank, size: number of this process, from 0, and of all.
        signum: the signal that asked any rank to stop, as all knew it at the last step; 0 without one.
        failing: ranks whose own loss was not finite at the last step.
        sharded: whether each rank holds a part of the base's layers, so that all run a layer at the same time.
    """

    rank: int = 0
    size: int = 1
    signum: int = 0
    failing: list[int] = field(default_factory=list)
    watch: Watch | None = None
    sharded: bool = False
    _asked: Callable[[], int] = lambda: 0

    @property
    def first(self) -> bool:
        """Whether this rank writes the run folder and prints."""
        return self.rank == 0

    def stop_requested(self) -> int:
        """The signal that ends the run, the same on every rank at every step; 0 without one."""
        return self._asked() if self.watch is None else self.signum

    def begin(self, step: int) -> None:
        """Optimizer step `step`, from 1, begins: messages name it."""
        if self.watch is not None:
            self.watch.step = step

    def deal(self, batches: Sequence[PackedBatch]) -> Share:
        """This rank's micro-batches; the same division on every rank. With a sharded base all run equally many."""
        if self.watch is None:
            return Share(tuple(range(len(batches))), batches)
        runs = -(-len(batches) // self.size) if self.sharded else None
        own = divide([batch.input_ids.numel() for batch in batches], self.size, runs)[self.rank]
        return Share(tuple(own), [batches[i] for i in own] + list(batches[:1]) * ((runs or 1) - len(own)))

    def sum_step(
        self, flat: FlatParameters, totals: Mapping[str, Tensor], share: Share
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """Sum gradient and totals over the ranks, in place; also returns what `hear` reads, (2 size,)."""
        if self.watch is None:
            return totals, flat.tail[:0]
        if share.idle:
            flat.grad.zero_()
        width = len(totals) + 1  # of a rank's row: its totals, and the signal that it was sent
        used = flat.tail[: width * self.size].zero_()
        if len(used) != width * self.size:
            raise ConfigError(f"{width - 1} metrics on {self.size} ranks: at most {len(flat.tail)} numbers go along")
        rows = used.view(self.size, width)
        if not share.idle:
            rows[self.rank, :-1] = torch.stack(list(totals.values()))
        rows[self.rank, -1] = float(self._asked())
        self.sum_(flat.with_tail[: flat.grad.numel() + len(used)])
        over_ranks = zip(totals, rows.sum(0), rows.amax(0), strict=False)
        summed = {name: most if name.endswith(LARGEST) else total for name, total, most in over_ranks}
        return summed, torch.cat([rows[:, list(totals).index("loss")], rows[:, -1]])

    def hear(self, more: Sequence[float]) -> None:
        """Learn from the second result of `sum_step`, on the host: who was asked to stop, whose loss is not finite."""
        losses, signals = more[: self.size], more[self.size :]
        self.failing = [rank for rank, loss in enumerate(losses) if loss - loss != 0.0]
        self.signum = self.signum or int(max(signals, default=0.0))

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a tensor on CPU or GPU, in place."""
        if self.watch is not None:
            import torch.distributed as dist

            with self.waiting():
                dist.all_reduce(values)
        return values

    def collect(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` gives on each rank, in their order, on every rank.

        The ranks may take unlike times, so they do not wait for each other in a collective; one that is at work when
        another fails ends at once.
        """
        if self.watch is None:
            return [work()]
        import torch.distributed as dist

        with self.watch.apart():
            own = work()
        found: list[Result] = [own] * self.size
        with self.waiting():
            self.watch.meet()
            dist.all_gather_object(found, own)
        return found

    def gather(self, share: Share, batches: Sequence[PackedBatch], sums: Sequence[LossSums]) -> tuple[LossSums, ...]:
        """The results of all micro-batches on every rank, from each rank's own: exact, as only one adds to a place."""
        if self.watch is None:
            return tuple(sums)
        sizes = [sums[0].room(len(batch.real), len(batch.scored_targets)) for batch in batches]
        parts = torch.zeros(sum(sizes), device=sums[0].loss.device).split(sizes)
        for number, one in zip(share.numbers, sums, strict=False):  # an idle rank has one that does not count
            parts[number].copy_(one.flat())
        rows = zip(batches, self.sum_(torch.cat(parts)).split(sizes), strict=True)
        return tuple(sums[0].like_this(row, len(batch.real)) for batch, row in rows)

    def shard(self, module: nn.Module, whole: Iterable[Tensor] = ()) -> None:
        """Keep 1 / size of the module's weights, but for `whole`; FSDP2 gathers them when it runs, and frees them."""
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

        ranks = self

        class Gather(DefaultAllGather):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                with ranks.waiting():
                    return super().__call__(*args, **kwargs)

        # torch 2.11 first makes each part a Parameter that requires a gradient, which bytes cannot.
        with patch.object(nn.Parameter.__new__, "__defaults__", (None, False)):
            fully_shard(module, ignored_params=cast("set[nn.Parameter]", set(whole)))
        cast("Any", module).set_custom_all_gather(Gather())
        self.sharded = True

    def check_equal(self, step: int, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Compare checksums of tensors over the ranks. Raises RankError, on all of them, with those that differ."""
        if self.watch is None:
            return
        sums = torch.zeros(self.size, 2 * len(parts), dtype=torch.int64)
        sums[self.rank] = torch.tensor([word for tensors in parts.values() for word in checksum(tensors)])
        self.sum_(sums)
        for number, name in enumerate(parts):
            own = sums[:, 2 * number : 2 * number + 2]
            other = [rank for rank in range(self.size) if not torch.equal(own[rank], own[0])]
            if other:
                who = f"rank{'s' * (len(other) > 1)} {', '.join(map(str, other))}"
                raise RankError(f"step {step}: the {name} of {who} differ from those of rank 0; nothing was saved", 1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for the other ranks. Raises RankError if one of them is the reason why it fails."""
        if self.watch is None:
            yield
            return
        if failure := self.watch.failure:
            raise self.watch.error(failure)
        self.watch.begin_waiting()
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo and NCCL name a connection; the watch knows the rank
            self.watch.end_waiting()
            if (failure := self.watch.found(seconds=5.0)) is None:
                raise
            raise self.watch.error(failure) from error
        finally:
            self.watch.end_waiting()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The block runs on rank 0, then on the others."""
        if self.watch is not None and not self.first:
            while not self.watch.reached("first"):
                if failure := self.watch.failure:
                    raise self.watch.error(failure)
                time.sleep(0.02)
        yield
        if self.watch is not None and self.first:
            self.watch.write("first")

    @contextmanager
    def together(self, interrupts: Interrupts, record: Callable[[int, str], None]) -> Iterator[None]:
        """A run; see `Watch.together`."""
        self._asked = lambda: interrupts.signum
        with self.watch.together(interrupts, record, self.stop_requested) if self.watch else nullcontext():
            yield


ALONE = Ranks()


def here(tensor: Tensor, *, whole: bool = False) -> Tensor:
    """The part of a tensor that this rank holds: all, unless it is sharded. `whole`: all of it, asked of all ranks."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor() if whole else tensor.to_local()


@contextmanager
def joined(timeouts: Mapping[str, float]) -> Iterator[Ranks]:
    """The ranks of this run: those of torchrun, each on the GPU of its local number, or one process alone.

    Args:
        timeouts: seconds, by key; after their sum, a rank that keeps the others waiting counts as hung.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(f"rank {local} of this machine has no GPU: {count} visible; start {count} processes")
        torch.cuda.set_device(local)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no name of it has to be known
    store, rank, size = next(dist.rendezvous("env://"))
    run = store.add(f"lowlevel/runs/{rank}", 1)  # a script may train several runs, one after another
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    second = dist.TCPStore(*address, is_master=False, wait_for_workers=False)  # NCCL may wait in the first one
    watch = Watch(dist.PrefixStore(f"lowlevel/watch/{run}", second), rank, size, timeouts)
    ranks = Ranks(rank, size, watch=watch)
    if failure := watch.absent():
        raise watch.error(failure)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit, own = timedelta(seconds=watch.timeout + _MORE), dist.PrefixStore(f"lowlevel/group/{run}", store)
    with ranks.waiting():
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
    failed = True
    try:
        yield ranks
        failed = False
    except GeneratorExit:  # every rank left its loop over the steps
        failed = False
        raise
    finally:
        if not (failed and torch.cuda.is_available()):  # NCCL would wait for ranks that are gone; this process ends
            dist.destroy_process_group()
