"""Operators of our own: functions that torch.compile calls as they are instead of tracing into them.

`torch.library.custom_op` does the same and checks more, in several layers of Python at each call. A host goes through
them 528 times to launch or capture a compiled micro-step of the recipe (SFT 2x4). What they check, tests check with
`torch.library.opcheck`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "lowlevel"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # its registrations last as long as it does


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function to be the operator `lowlevel::name`, with the schema of its type hints, on every device.

    It must return new tensors only: none that is an argument or shares its memory. What it returns for the compiler is
    given by `torch.library.register_fake`, its gradient by `torch.library.register_autograd`.
    """

    def define(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return define
