"""Sampling by Hugging Face's `generate`: for every architecture, slow, and the truth for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lowlevel.heartbeat import Work, counted
from lowlevel.model.attention_choice import plain_attention
from lowlevel.model.dropout import CounterDropout
from lowlevel.model.placement import Placement
from lowlevel.model.policy import AnyModel, plain_model
from lowlevel.sampling.completion import Completion, Ids, Sampling, Watch, completion_keys
from lowlevel.sampling.draw import draw, token_keys

PLAIN = "Hugging Face's generate, which is slower"


class PlainSampler:
    """See Sampler. Every token waits for the host, and a batch for its longest completion."""

    def __init__(self, model: AnyModel, placement: Placement, stop_ids: Sequence[int], *, batch_size: int = 16) -> None:
        """`batch_size` completions are sampled at a time."""
        self.base: Any = plain_model(model)
        self.placement = placement
        self.stop_ids = sorted(stop_ids)
        self.batch_size = batch_size

    def sample(
        self, prompts: Ids, sampling: Sampling, *, samples: int = 1, keys: Ids | None = None, watch: Watch | None = None
    ) -> list[list[Completion]]:
        """See Sampler."""
        keys = keys or completion_keys(sampling.seed, len(prompts), samples)
        wanted = [(prompt, key) for prompt, own in zip(prompts, keys, strict=True) for key in own]
        size, found = self.batch_size, []
        starts = range(0, len(wanted), size)
        for start in counted("generating", starts, "batches"):
            found += self._batch(wanted[start : start + size], sampling, start, watch)
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    @torch.no_grad()
    def _batch(
        self, wanted: Sequence[tuple[Sequence[int], int]], sampling: Sampling, first: int, watch: Watch | None
    ) -> list[Completion]:
        """Prompts are padded on the left, and the padding is masked by length."""
        width = max(len(prompt) for prompt, _ in wanted)
        ids = torch.full((len(wanted), width), self.stop_ids[0], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, _) in enumerate(wanted):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        device = self.placement.device
        drawing = _Drawing(torch.tensor([key for _, key in wanted]), sampling, self.stop_ids, first, watch)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
            use_cache=True,
            do_sample=False,
        )
        own, self.base.generation_config = self.base.generation_config, config  # else the base's penalties apply
        try:
            with plain_attention(self.base), without_dropout(self.base), self.placement.autocast():
                self.base.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([drawing]),
                )
        finally:
            self.base.generation_config = own
        return drawing.completions()


class _Drawing(LogitsProcessor):
    """Draws each token; `generate`, which takes the likeliest, is left no other choice."""

    def __init__(self, keys: Tensor, sampling: Sampling, stop_ids: list[int], first: int, watch: Watch | None) -> None:
        self.keys, self.sampling, self.stop_ids, self.first, self.watch = keys, sampling, stop_ids, first, watch
        self.drawn: list[tuple[np.ndarray, np.ndarray]] = []  # tokens and log-probabilities, (B,) each
        self.done = np.zeros(len(keys), bool)
        self.sizes: dict[int, int] = {}  # tokens of the completions that the watch ended, by row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        Work.signs += 1
        position = torch.full_like(self.keys, len(self.drawn), dtype=torch.int32)
        vectors = (self.keys.to(torch.int32).to(scores.device), position.to(scores.device))
        words = token_keys(scores.shape[1], scores.device)
        tokens, logps = draw(scores, self.sampling.temperature, *vectors, words)
        self.drawn.append((tokens.cpu().numpy(), logps.cpu().numpy()))
        if self.watch is not None:
            for i in map(int, np.flatnonzero(~self.done)):
                if self.watch(self.first + i, [int(self.drawn[-1][0][i])]):
                    self.sizes[i] = len(self.drawn)
        self.done |= np.isin(self.drawn[-1][0], self.stop_ids)
        if ended := list(self.sizes):
            self.done[ended] = True
            tokens = tokens.index_fill(0, tokens.new_tensor(ended), self.stop_ids[0])  # so `generate` ends them, too
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def completions(self) -> list[Completion]:
        """The tokens of each row up to its stop token."""
        ids, logps = (np.stack(part, axis=1) for part in zip(*self.drawn, strict=True))
        found = []
        for i, (row, own) in enumerate(zip(ids, logps, strict=True)):
            stops = np.flatnonzero(np.isin(row, self.stop_ids))
            size = self.sizes.get(i) or (int(stops[0]) + 1 if len(stops) else len(row))
            found.append(Completion(row[:size], own[:size], bool(row[size - 1] in self.stop_ids)))
        return found


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout of the adapters off within the block."""
    states = {module.state for module in model.modules() if isinstance(module, CounterDropout)}
    before = {state: state.token_keys for state in states}
    for state in states:
        state.token_keys = None
    try:
        yield
    finally:
        for state, token_keys in before.items():
            state.token_keys = token_keys
