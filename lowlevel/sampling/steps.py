"""Decoding steps on the device: state, drawing, and CUDA graphs of both kinds of pass.

A step reads the last token of every slot, runs the layers, draws the next token, and writes it with its
log-probability, all without the host: the state below is read and written in place. So one captured graph serves every
step of B slots. A slot that is done computes along and changes nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowlevel.sampling.cached_model import CachedModel, Prompts
from lowlevel.sampling.completion import Sampling
from lowlevel.sampling.draw import draw, token_keys

TOKEN, POSITION, KEY, COUNT, DONE, ENDED = range(6)  # rows of the state; DONE of a free slot is 1
FIELDS = 6
MODES = ("eager", "compiled", "graphed")  # as in execution.py


class Steps:
    """The state of all slots and the passes that change it."""

    def __init__(self, model: CachedModel, stop_ids: Sequence[int], mode: str, note: Callable[[str], None]) -> None:
        """`mode` of MODES; `note` prints a line if it has to be a simpler one."""
        device, words = model.placement.device, model.base.get_output_embeddings().weight.shape[0]
        self.model, self.note = model, note
        self.words, self.stops = token_keys(words, device), torch.tensor(stop_ids, device=device)
        self.temperature = torch.zeros((), device=device)
        self.limit = torch.zeros((), dtype=torch.int64, device=device)  # tokens of a completion
        self.adapters: tuple[str, ...] = ()
        self.failure: BaseException | None = None  # why the mode became a simpler one
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._ran: set[Hashable] = set()  # passes that ran uncaptured once: compilers and libraries are ready
        self._failed: set[Hashable] = set()  # passes whose capture failed once
        self._pool: Any = None
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.use(mode)

    def use(self, mode: str) -> None:
        """Switch to a mode of MODES."""
        self.mode, self.model.compiled = mode, mode != "eager"
        self.forget()
        if self.model.compiled:  # the trainer's graphs of the same layers count too
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        compiled = torch.compile(_advance, fullgraph=True, dynamic=True) if self.model.compiled else _advance
        self._advance: Callable[..., None] = compiled

    def forget(self) -> None:
        """Drop the graphs: tensors that they read or write are replaced."""
        if self._graphs:
            torch.cuda.synchronize()  # they may still be running
        self._graphs, self._ran, self._failed = {}, set(), set()

    def begin(self, sampling: Sampling, slots: int, capacity: int) -> None:
        """Get ready for up to `slots` sequences of up to `capacity` tokens, prompts included, from the model as it is.

        What the slots held is gone if there was not enough room.
        """
        self.heat = float(sampling.temperature)
        self.temperature.fill_(self.heat)
        self.limit.fill_(sampling.max_new_tokens)
        self.adapters = self.model.active_adapters()
        if self.model.reserve(slots, capacity):
            self.forget()
            rows, device = self.model.slots, self.temperature.device
            self.state = torch.zeros(FIELDS, rows, dtype=torch.int64, device=device)
            self.ids = torch.zeros(rows, self.model.capacity + 1, dtype=torch.int64, device=device)
            self.logps = torch.zeros(self.ids.shape, device=device)  # the last column, as in `ids`, is of no token
        self.state[DONE] = 1

    def read(self, prompts: Prompts) -> None:
        """Write the keys and values of prompts into the cache."""
        self._run(("read", len(prompts.ids), len(prompts.tensors()), self.adapters), self.model.read, prompts)

    def step(self, rows: int) -> None:
        """The next token of slots 0 to `rows` - 1."""
        self._run(("step", rows, self.adapters), lambda _: self._step(rows), None)

    def _step(self, rows: int) -> None:
        state = self.state[:, :rows]
        logits = self.model.next_logits(state[TOKEN], state[POSITION])
        outputs = (self.ids[:rows], self.logps[:rows])
        heat = self.heat if self.mode == "eager" else self.temperature  # a graph serves every temperature
        self._advance(state, *outputs, logits, heat, self.limit, self.words, self.stops)

    def _run(self, name: Hashable, work: Callable[[Any], None], inputs: Prompts | None) -> None:
        """A pass in the mode; if it cannot be compiled or captured, in the next simpler one."""
        try:
            with torch.inference_mode() if self.mode == "eager" else torch.no_grad():  # see model/linear.py
                if self.mode == "graphed":
                    self._replay(name, work, inputs)
                else:
                    with self.model.installed():
                        work(inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if self.mode == "eager":
                raise
            self.failure = first_cause(error).with_traceback(None)  # which holds tensors and graph of the failed pass
            simpler = MODES[MODES.index(self.mode) - 1]
            reason = (str(self.failure).strip() or type(self.failure).__name__).splitlines()[0]
            self.note(f"sampling: {self.mode} failed ({reason[:200]}); continuing {simpler}")
            self.use(simpler)
            self._run(name, work, inputs)  # a pass that failed wrote at most keys and values that it writes again

    def _replay(self, name: Hashable, work: Callable[[Any], None], inputs: Prompts | None) -> None:
        """Run the pass uncaptured the first time, capture it the second time, and replay it from then on."""
        if name not in self._graphs:
            # Copies in both of these passes: compilers tell views from other tensors, and would compile in the capture.
            own = None if inputs is None else Prompts(**{name: one.clone() for name, one in inputs.tensors().items()})
            if name not in self._ran:
                return self._run_uncaptured(name, lambda: work(own))
            try:
                self._graphs[name] = (self._capture(lambda: work(own)), own)
            except Exception:  # as in execution.py: once more, after a pass that may compile
                if name in self._failed:
                    raise
                self._failed.add(name)
                return self._run_uncaptured(name, lambda: work(own))
        graph, own = self._graphs[name]
        if own is not None and inputs is not None:
            torch._foreach_copy_(list(own.tensors().values()), list(inputs.tensors().values()))
        graph.replay()

    def _run_uncaptured(self, name: Hashable, work: Callable[[], None]) -> None:
        """Run on the stream of the captures; afterwards compilers and libraries are ready for one."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self.model.installed():
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._ran.add(name)

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture a pass. A failure leaves torch's generator usable: torch 2.11's would stay in its capturing state."""
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.get_state()
        gc.collect()  # garbage of compilers may hold kernels and events, and to free them is forbidden in a capture
        torch.cuda.synchronize()
        try:
            with self.model.installed(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        except Exception:
            fresh = torch.Generator(generator.device)
            fresh.set_state(before)
            generator.graphsafe_set_state(fresh)
            self._pool = None  # the failed capture still holds it
            raise
        self._pool = self._pool or graph.pool()
        return graph


def first_cause(error: BaseException) -> BaseException:
    """The error inside a capture: the end of the failed capture raises another one."""
    while error.__context__ is not None and error.__cause__ is None:
        error = error.__context__
    return error


def _advance(
    state: Tensor, ids: Tensor, logps: Tensor, logits: Tensor, temperature: float | Tensor, limit: Tensor,
    words: Tensor, stops: Tensor,
) -> None:  # fmt: skip
    """Draw a token of each row and write it: state (FIELDS, B), ids and logps (B, C + 1), logits (B, V)."""
    token, position, key, count, done, ended = state.unbind(0)
    new, logp = draw(logits, temperature, key.to(torch.int32), count.to(torch.int32), words)
    live = done == 0
    column = torch.where(live, count, ids.shape[1] - 1)[:, None]
    ids.scatter_(1, column, new[:, None])
    logps.scatter_(1, column, logp[:, None])
    stopped = live & (new[:, None] == stops).any(1)
    count = count + live
    finished = (done != 0) | stopped | (count >= limit)
    state.copy_(
        torch.stack(
            [
                torch.where(live, new, token),
                position + live,
                key,
                count,
                finished.to(torch.int64),
                (ended != 0).logical_or(stopped).to(torch.int64),
            ]
        )
    )
