"""Custom operators: functions that torch.compile calls as they are instead of tracing into them.

`torch.library.custom_op` does the same with more checks in every call. Here tests do these checks, with
`torch.library.opcheck`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "lowlevel"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # registrations end when this object is deleted


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function as the operator `lowlevel::name` on every device; its type hints are the schema.

    The function must return new tensors that share no memory with its arguments. Register the shapes of its results
    with `torch.library.register_fake` and its gradient with `torch.library.register_autograd`.
    """

    def define(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return define
