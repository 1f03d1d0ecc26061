"""Tensors in host memory: the inputs of recomputed layers (`train.offload_activations`), and the input embedding
(`model.embeddings_on_host`).

torch.utils.checkpoint saves a layer's input through the saved-tensor hooks that surround the call (so that checkpoints
nest), and saves tensors inside the layer through its own hooks. Hooks around a checkpointed layer only get its input.

    forward     the input of layer i is copied to the host while layer i runs
    backward    the input of layer i - 1 is copied back while layer i is recomputed

Copies run on a second stream that forks from the current one and joins it around each layer. A CUDA graph captures
this as a branch, and no memory is freed or written while a copy uses it. Each layer has one buffer at a fixed address,
pinned if the device is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowlevel.errors import ConfigError
from lowlevel.kernels.host_rows import host_rows

TIED = "model.embeddings_on_host: this model's input embedding is its LM head too; leave it out"


@dataclass(frozen=True, eq=False)
class Stored:
    """The input of a layer on the host; each forward pass makes a new object."""

    number: int  # of the layer, from 0
    host: Tensor  # (rows, T, D), in the layer's buffer


class HostInputs:
    """Host buffers for the inputs of the recomputed layers, one micro-batch at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[int, Tensor] = {}  # bytes, by layer; allocated for its first input, and for a larger one
        self._outgrown: list[Tensor] = []  # captured graphs still copy to and from these
        self._stored: dict[int, Stored] = {}  # by layer
        self._ahead: tuple[Stored, Tensor] | None = None  # the next input, already on its way back

    @contextmanager
    def keeping(self, number: int) -> Iterator[None]:
        """Put this around the checkpointed forward of layer `number`; its input must stay alive until the end.

        Raises RuntimeError if a buffer must grow during a CUDA graph capture, when no memory can be pinned, or if a
        later forward pass has overwritten an input of the backward pass.
        """
        with saved_tensors_hooks(partial(self._store, number), self._load):
            yield
        self._join()
        self._ahead = None  # left by a backward pass that ended early

    def _store(self, number: int, tensor: Tensor) -> Stored | Tensor:
        if not tensor.numel():
            return tensor  # torch 2.11's checkpoint also saves an empty tensor
        host = self._buffer(number, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        self._fork()
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        self._stored[number] = Stored(number, host)
        return self._stored[number]

    def _load(self, stored: Stored | Tensor) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        if self._stored[stored.number] is not stored:
            raise RuntimeError(f"layer {stored.number}: a later forward pass overwrote its input on the host")
        tensor = self._ahead[1] if self._ahead and self._ahead[0] is stored else self._fetch(stored)
        self._join()
        before = self._stored.get(stored.number - 1)
        self._ahead = (before, self._fetch(before)) if before else None
        return tensor

    def _fetch(self, stored: Stored) -> Tensor:
        """A copy on the device, complete after the next `_join`."""
        tensor = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=self._device)
        self._fork()
        with torch.cuda.stream(self._stream):
            return tensor.copy_(stored.host, non_blocking=True)

    def _buffer(self, number: int, size: int) -> Tensor:
        """`size` bytes of the layer's buffer."""
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < size:
            if self._stream and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"layer {number}: cannot pin {size:,} bytes on the host during a graph capture")
            self._outgrown += [] if buffer is None else [buffer]
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers[number] = buffer
        return buffer[:size]

    def _fork(self) -> None:
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def _join(self) -> None:
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)


class HostEmbedding(nn.Module):
    """Replaces a frozen nn.Embedding: the same numbers, read from pinned host memory."""

    def __init__(self, table: Tensor) -> None:
        """Copy `table` (V, D) to the host."""
        super().__init__()
        host = table.detach().cpu()
        self.weight = nn.Parameter(host.pin_memory() if table.is_cuda else host, requires_grad=False)
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, input_ids: Tensor) -> Tensor:
        """(rows, T) int64 -> (rows, T, D)."""
        return host_rows(self.weight, input_ids)


def move_embeddings_to_host(model: Any) -> None:
    """Move the input embedding to the host. Raises ConfigError if it is tied, or more than a lookup (Gemma 3)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:
        raise ConfigError(f"model.embeddings_on_host: {type(embedding).__name__} does more than look up; leave it out")
    if embedding.weight is head.weight or embedding.weight.data_ptr() == head.weight.data_ptr():
        raise ConfigError(TIED)
    model.set_input_embeddings(HostEmbedding(embedding.weight))
    if embedding.weight.is_cuda:
        torch.cuda.empty_cache()
