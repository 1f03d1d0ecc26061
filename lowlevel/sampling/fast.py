"""Continuous batching: slots are filled with waiting completions, a few steps run, finished ones leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.beginnings import by_beginning
from lowlevel.heartbeat import working
from lowlevel.model.placement import Placement
from lowlevel.model.policy import AnyModel, plain_model
from lowlevel.model.suitability import attention_window, short_positions
from lowlevel.model.targets import size_of
from lowlevel.sampling.cached_model import SHARE, CachedModel, Prompts
from lowlevel.sampling.completion import Completion, Ids, Sampling, Watch, completion_keys
from lowlevel.sampling.plain import PLAIN, PlainSampler, without_dropout
from lowlevel.sampling.steps import COUNT, DONE, ENDED, Steps

SLOTS = {"cuda": 128, "cpu": 32}  # more take more memory, and a CPU is not faster with them
TURN = {"cuda": 8, "cpu": 1}  # steps between two looks at the finished flags, for which a GPU has to wait
MOST_READ = {"cuda": 4096, "cpu": 1024}  # tokens of prompts that are read in one pass, unless one prompt is longer
LEAST_READ = 64
SHARING = ("cpu",)  # where beginnings are shared: their groups are sampled in turn, which a GPU has not been timed with
SPANS = 64  # prompts that are read in one pass


@dataclass(eq=False)
class Wanted:
    """A completion that is waited for."""

    number: int  # prompt * samples + sample
    prompt: int
    ids: Sequence[int]  # of the prompt
    key: int
    count: int = 0  # tokens so far, at the last look


class FastSampler:
    """See Sampler. Between two steps nothing waits for the host; see the package's docstring."""

    def __init__(
        self,
        model: AnyModel,
        placement: Placement,
        stop_ids: Sequence[int],
        note: Callable[[str], None] = print,
        *,
        slots: int | None = None,
        mode: str | None = None,
        join: bool | None = None,
    ) -> None:
        """Prepare to sample from a model.

        Args:
            model: without a `misfit`; it stays as it is, and is used in whatever state it is when `sample` is called.
            placement: of the model.
            stop_ids: tokens that end a completion.
            note: prints a line.
            slots: completions that are sampled at a time; None: SLOTS.
            mode: of steps.MODES; None: the device's fastest.
            join: copy the weights of linear layers in the placement's dtype (joined.py), instead of reading them as
                they are, in 4 bits; None: on a GPU with memory for it.
        """
        base = plain_model(model)
        limits = (attention_window(base.config), short_positions(base.config))
        self.longest = min((limit for limit in limits if limit), default=None)  # tokens that every layer sees alike
        self.plain, self.note = PlainSampler(model, placement, stop_ids), note
        self.placement, self.model = placement, CachedModel(base, placement)
        on_gpu = placement.device.type == "cuda"
        if join or join is None and on_gpu and self.model.joined_bytes() < SHARE * torch.cuda.mem_get_info()[0]:
            self.model.join()
        self.steps = Steps(self.model, sorted(stop_ids), mode or ("graphed" if on_gpu else "eager"), note)
        self.slots = slots or SLOTS[placement.device.type]
        self._seats: list[Wanted | None] = []  # by slot
        self._held: list[int | None] = []  # the prompt whose keys and values are in the slot
        self._told = 0  # tokens of the longest prompt of which a note was made
        self._shared = 0  # tokens that all prompts begin with, whose keys and values are in every slot

    def sample(
        self, prompts: Ids, sampling: Sampling, *, samples: int = 1, keys: Ids | None = None, watch: Watch | None = None
    ) -> list[list[Completion]]:
        """See Sampler."""
        keys = keys or completion_keys(sampling.seed, len(prompts), samples)
        length = (longest := max(map(len, prompts), default=0)) + sampling.max_new_tokens
        if longest > max(self._told, positions := size_of(self.model.base.config, "max_position_embeddings")):
            self._told = longest
            self.note(f"sampling: a prompt of {longest:,} tokens is longer than the base's {positions:,} positions")
        if self.longest is not None and length > self.longest:
            self.note(f"sampling: {length:,} tokens exceed the base's window of {self.longest:,}: by {PLAIN}")
            return self.plain.sample(prompts, sampling, samples=samples, keys=keys, watch=watch)
        self.steps.begin(sampling, self._rows(len(prompts) * samples, self.slots), length)
        found: dict[int, Completion] = {}
        shares = self.placement.device.type in SHARING
        for shared, group in by_beginning(prompts) if shares else [(0, [*range(len(prompts))])]:
            waiting = deque(Wanted(i * samples + j, i, prompts[i], keys[i][j]) for i in group for j in range(samples))
            found |= self._sample(waiting, shared, sampling.max_new_tokens, watch)
        return [[found[i * samples + j] for j in range(samples)] for i in range(len(prompts))]

    def _sample(self, waiting: deque[Wanted], shared: int, limit: int, watch: Watch | None) -> dict[int, Completion]:
        """Completions of up to `limit` tokens by number, of prompts with the same first `shared` tokens."""
        found: dict[int, Completion] = {}
        rows = self._rows(len(waiting), min(self.slots, self.model.slots))
        self._seats, self._held, self._shared = [None] * rows, [None] * rows, 0
        try:
            with without_dropout(self.model.base), working("generating", len(waiting), "replies") as work:
                if shared:
                    self.steps.read(self._pack([(0, waiting[0].ids[:shared])]))
                    self.model.copy(self._tensor([0] * rows), self._tensor(range(rows)), shared)
                    self._shared = shared
                while waiting or any(self._seats):
                    self._fill(waiting, rows)
                    rows = rows if waiting else self._close_up(rows)
                    left = limit - min(one.count for one in self._seats if one)
                    for _ in range(min(TURN[self.placement.device.type], left)):
                        self.steps.step(rows)
                    found |= self._collect(rows, watch)
                    work.done = len(found)
        finally:
            self.steps.state[DONE] = 1
            self._seats = []
        return found

    def _fill(self, waiting: deque[Wanted], rows: int) -> None:
        """Give free slots among the first `rows` to waiting completions; each prompt is read once and copied."""
        free = [slot for slot in range(rows) if self._seats[slot] is None]
        taken = dict(zip(free, [waiting.popleft() for _ in range(min(len(free), len(waiting)))], strict=False))
        if not taken:
            return
        sources = {held: slot for slot, held in enumerate(self._held) if held is not None and slot not in taken}
        to_read, copies = [], []
        for slot, wanted in taken.items():
            if wanted.prompt in sources:
                copies.append((sources[wanted.prompt], slot, len(wanted.ids) - 1))
            else:
                sources[wanted.prompt] = slot
                to_read.append((slot, wanted.ids[self._shared : -1]))
            self._seats[slot], self._held[slot] = wanted, wanted.prompt
        for prompts in self._packed(to_read):
            self.steps.read(prompts)
        if copies:
            pairs = self._tensor([pair[:2] for pair in copies]).T
            self.model.copy(pairs[0], pairs[1], max(length for _, _, length in copies))
        starts = [[w.ids[-1], len(w.ids) - 1, w.key, 0, 0, 0] for w in taken.values()]
        self.steps.state[:, self._tensor(list(taken))] = self._tensor(starts).T

    def _packed(self, to_read: Iterable[tuple[int, Sequence[int]]]) -> Iterable[Prompts]:
        """The prompts side by side, a pass's number of them at a time, filled up to one of few sizes."""
        group: list[tuple[int, Sequence[int]]] = []
        most = MOST_READ[self.placement.device.type]
        for slot, ids in sorted(to_read, key=lambda item: len(item[1])):
            if group and (len(group) == SPANS or sum(len(own) for _, own in group) + len(ids) > most):
                yield self._pack(group)
                group = []
            group += [(slot, ids)] * bool(ids)
        if group:
            yield self._pack(group)

    def _pack(self, group: Sequence[tuple[int, Sequence[int]]]) -> Prompts:
        longest, tokens = self.model.capacity, sum(len(ids) for _, ids in group)
        size = tokens if self.steps.mode == "eager" else _read_size(tokens)
        bounds = np.concatenate([[0], np.cumsum([len(ids) for _, ids in group])])
        fill = np.arange(tokens, size + longest, longest).clip(max=size)  # spans that fill up the row
        number = SPANS + -(-size // longest) + 1
        bounds = np.concatenate([bounds, fill[1:], np.full(number, size)])[: number + 1]
        ids, positions, slots = np.zeros((3, size), np.int64)
        slots[:] = self.model.slots
        positions[tokens:] = np.arange(size - tokens) % longest
        for (slot, own), start in zip(group, bounds[:-1], strict=False):
            place = slice(start, start + len(own))
            ids[place], positions[place], slots[place] = own, self._shared + np.arange(len(own)), slot
        packed = self._tensor(np.stack([ids, positions, slots]))
        beginning = self._tensor([0, self._shared]).int() if self._shared else None
        return Prompts(packed[0], packed[1], packed[2], self._tensor(bounds).int(), beginning)

    def _collect(self, rows: int, watch: Watch | None) -> dict[int, Completion]:
        """Completions that ended in this turn, by number; their slots are free. Waits for the device."""
        state = self.steps.state[:, :rows].cpu().numpy()
        seated = [slot for slot in range(rows) if self._seats[slot] is not None]
        wanted = [slot for slot in seated if watch or state[DONE, slot]]
        outputs: Any = ((), ())
        if wanted:
            index, width = self._tensor(wanted), int(state[COUNT, wanted].max())
            outputs = [part[index, :width].cpu().numpy() for part in (self.steps.ids, self.steps.logps)]
        found, stopped = {}, []
        for slot, own, own_logps in zip(wanted, *outputs, strict=True):
            one, size = self._seats[slot], int(state[COUNT, slot])
            assert one is not None
            if watch and watch(one.number, own[one.count : size].tolist()):
                stopped.append(slot)
            if state[DONE, slot] or slot in stopped:
                found[one.number] = Completion(own[:size].copy(), own_logps[:size].copy(), bool(state[ENDED, slot]))
                self._seats[slot] = None
        self.steps.state[DONE, self._tensor(stopped)] = 1
        for slot in seated:
            if (one := self._seats[slot]) is not None:
                one.count = int(state[COUNT, slot])
        return found

    def _close_up(self, rows: int) -> int:
        """Once nothing waits: the fewest slots that hold the last completions, of which some move to free ones."""
        seats = self._seats
        fewer = self._rows(sum(one is not None for one in seats), rows)
        moving = {slot: one for slot, one in enumerate(seats) if one and slot >= fewer}
        if moving:
            free = [slot for slot in range(fewer) if seats[slot] is None][: len(moving)]
            sources, targets = self._tensor(list(moving)), self._tensor(free)
            self.model.copy(sources, targets, max(len(one.ids) + one.count for one in moving.values()))
            for tensor, dim in ((self.steps.state, 1), (self.steps.ids, 0), (self.steps.logps, 0)):
                tensor.index_copy_(dim, targets, tensor.index_select(dim, sources))
            for slot, target in zip(moving, free, strict=True):
                seats[target], seats[slot] = seats[slot], None
        self.steps.state[DONE, fewer:] = 1
        return fewer

    def _rows(self, wanted: int, most: int) -> int:
        """Slots of a step, from 2, because compilers treat a size of 1 as another graph. Graphs: powers of two."""
        return min(most, max(2, wanted if self.steps.mode == "eager" else 1 << (wanted - 1).bit_length()))

    def _tensor(self, values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self.placement.device)


def _read_size(tokens: int) -> int:
    """Tokens of a pass over prompts on a GPU: powers of two up to MOST_READ, then its multiples."""
    most = MOST_READ["cuda"]
    if tokens > most:
        return -(-tokens // most) * most
    return max(LEAST_READ, 1 << (tokens - 1).bit_length())
