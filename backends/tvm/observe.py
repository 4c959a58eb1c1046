"""What a compiled library computes in every call of a converted block, watched from outside: the library that is
watched is the one that is deployed.

TVM's virtual machine tells each kernel that it calls and with which tensors. A call of a block is these kernels, in
this order (names have their constants behind; see the table of families):

    moe_dispatch_*  first argument: experts [T, K]
    moe_up_*        first argument: rows [T, D]
    moe_down_*      last argument: the result [T, O]

    moe_permute_*   first arguments: rows [T, D], experts [T, K]
    moe_unpermute_* last argument: the result [T, O]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm

from moeify.backends.calls import Call, Seen
from moeify.backends.tvm.loader import Compiled, Inputs
from moeify.errors import BrokenProgram

_FIRST = ("moe_dispatch_", "moe_permute_")
_LAST = ("moe_down_", "moe_unpermute_")


@dataclass
class _Open:
    """A call whose result is not there yet, or may still be written over."""

    rows: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    output: torch.Tensor | None = None


def seen(compiled: Compiled, calls: Sequence[Call], inputs: Inputs) -> dict[str, Seen]:
    """Run it once; what each call computed, by ``Call.name``. ``calls`` are in graph order.

    Raises BrokenProgram when the kernels do not make as many calls as the program has.
    """
    made: list[_Open] = []

    def watch(_function: Any, name: str, before: bool, _result: Any, *arguments: Any) -> None:
        if before:
            if name.startswith(_FIRST) and (not made or made[-1].output is not None):
                made.append(_Open())  # a kernel of a few steps has one name in front of all of them
                experts = 1 if name.startswith("moe_permute_") else 0
                made[-1].experts = _copy(arguments[experts])
                made[-1].rows = _copy(arguments[0]) if experts else None
            elif name.startswith("moe_up_") and made and made[-1].rows is None:
                made[-1].rows = _copy(arguments[0])
        elif name.startswith(_LAST) and made:
            made[-1].output = _copy(arguments[-1])

    compiled.machine.set_instrument(watch)
    try:
        compiled.run(inputs)
    finally:
        compiled.machine.set_instrument(None)
    if len(made) != len(calls):
        raise BrokenProgram(f"the library makes {len(made)} calls of blocks, the program {len(calls)}")
    return {call.name: _seen(call, one) for call, one in zip(calls, made)}


def _seen(call: Call, one: _Open) -> Seen:
    if one.rows is None or one.experts is None or one.output is None:
        raise BrokenProgram(f"the kernels of {call.name} do not show its rows, its experts and its result")
    return Seen(one.rows, one.experts, one.output)


def _copy(tensor: Any) -> torch.Tensor:
    """At once: the machine uses the memory again."""
    return torch.from_dlpack(tensor.copyto(tvm.cpu()))
