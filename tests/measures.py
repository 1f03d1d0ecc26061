"""What a computation makes on the way: the sizes of its tensors, its host syncs, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sizes(TorchDispatchMode):
    """The largest tensor of each dtype that any operation gave, and how often a value went to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: dict[torch.dtype, int] = {}
        self.syncs = 0

    @property
    def largest(self) -> int:
        return max(self.by_dtype.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.syncs += func.overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::nonzero")
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.by_dtype[tensor.dtype] = max(self.by_dtype.get(tensor.dtype, 0), tensor.numel())
        return result


def kept_for_backward(function: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd saves while a function runs."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept
