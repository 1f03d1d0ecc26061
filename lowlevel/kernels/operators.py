"""Custom operators: functions that torch.compile calls as they are instead of tracing into them.

`torch.library.custom_op` does the same with more checks in every call. Here tests do these checks, with
`torch.library.opcheck`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "lowlevel"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # registrations end when this object is deleted


def operator(name: str, *, writes: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function as the operator `lowlevel::name` on every device; its type hints are the schema.

    The function must return new tensors that share no memory with its arguments; it may write into the arguments that
    `writes` names. Register the shapes of its results with `torch.library.register_fake` and its gradient with
    `torch.library.register_autograd`.
    """

    def define(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=tuple(writes))
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return define


def launches(trial: Callable[[], object], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels, which `trial` launches, compile and run on a device; if not, warns with the reason."""
    try:
        trial()
    except Exception as error:  # Triton's errors have no common class: missing package, no driver, compiler, ptxas
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(f"plain torch instead of Triton's kernels on {device} in {dtype}: {reason}", stacklevel=3)
        return False
    return True
