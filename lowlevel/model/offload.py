"""Inputs of recomputed layers in host memory between forward and backward pass (`train.offload_activations`).

torch.utils.checkpoint saves a layer's input through the saved-tensor hooks around the call (so that checkpoints nest),
and what is saved inside the layer through its own: hooks around a checkpointed layer see its input alone.

    forward     the input of layer i goes to the host while layer i runs on it
    backward    the input of layer i - 1 comes back while layer i is recomputed

The copies run in a stream of their own, which starts from the current stream and joins it again around each layer: a
CUDA graph takes that as a branch, and no memory is freed or written while a copy uses it. Each layer has one buffer,
pinned on a GPU, whose address stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True, eq=False)
class Stored:
    """The input of a layer on the host; another object with each forward pass."""

    number: int  # of the layer, from 0
    host: Tensor  # (rows, T, D), in the layer's buffer


class HostInputs:
    """Room on the host for the input of each recomputed layer: those of one micro-batch at a time."""

    def __init__(self, device: torch.device) -> None:
        """`device` computes. Buffers are made when a layer first runs, and again for larger inputs."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[int, Tensor] = {}  # bytes, by layer
        self._outgrown: list[Tensor] = []  # captured graphs still copy to and from these
        self._stored: dict[int, Stored] = {}  # by layer
        self._ahead: tuple[Stored, Tensor] | None = None  # what is on its way back already

    @contextmanager
    def keeping(self, number: int) -> Iterator[None]:
        """Around the checkpointed forward of layer `number`; its input must stay alive until the end.

        Raises:
            RuntimeError: a larger input than any before, within a capture, where no memory can be pinned; or, in the
                backward pass, a later forward pass has taken the place of the input.
        """
        with saved_tensors_hooks(partial(self._store, number), self._load):
            yield
        self._join()
        self._ahead = None  # left by a backward pass that ended early

    def _store(self, number: int, tensor: Tensor) -> Stored | Tensor:
        if not tensor.numel():
            return tensor  # torch 2.11's checkpoint saves an empty tensor of its own as well
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
            raise RuntimeError(f"layer {stored.number}: a later forward pass took the place of its input on the host")
        tensor = self._ahead[1] if self._ahead and self._ahead[0] is stored else self._fetch(stored)
        self._join()
        before = self._stored.get(stored.number - 1)
        self._ahead = (before, self._fetch(before)) if before else None
        return tensor

    def _fetch(self, stored: Stored) -> Tensor:
        """A copy on the device, complete after the next `_join`; its memory is the current stream's."""
        tensor = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=self._device)
        self._fork()
        with torch.cuda.stream(self._stream):
            return tensor.copy_(stored.host, non_blocking=True)

    def _buffer(self, number: int, size: int) -> Tensor:
        """`size` bytes of the layer's buffer."""
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < size:
            if self._stream and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"layer {number}: no room on the host for {size:,} bytes, and none can be pinned now"
                )
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
