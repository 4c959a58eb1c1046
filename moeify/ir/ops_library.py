"""The ``torch.library.Library`` that holds ``moe.*``, and how an operator is put into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library

NAMESPACE = "moeify"

# A Library object takes its operators with it when it dies, so it lives as long as the module.
LIBRARY = Library(NAMESPACE, "DEF")

NAMES: list[str] = []

_TAGS = (torch.Tag.pt2_compliant_tag,)


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define an operator: schema, one implementation for CPU and CUDA, fake, its explicit backward if it has one."""
    name = _declare(schema, tags)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    else:
        LIBRARY.impl(name, _without_gradient(getattr(torch.ops.moeify, name).default), "Autograd")


def define_composite(schema: str, implementation: Callable[..., Any]) -> None:
    """Define an operator that is nothing but the ATen operators it calls: fake and gradients come from them."""
    LIBRARY.impl(_declare(schema, ()), implementation, "CompositeImplicitAutograd")


def _declare(schema: str, tags: Sequence[torch.Tag]) -> str:
    LIBRARY.define(schema, tags=(*_TAGS, *tags))
    NAMES.append(schema.partition("(")[0])
    return NAMES[-1]


def _without_gradient(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return below_autograd
