"""A Program in float16 or bfloat16: a twin whose weights, inputs and activations are half precision.

What stays float32, and why:

- casts to float32 of the author, and what is computed from them (``softmax(dtype=torch.float32)``). Where such a value
  meets a half one it is cast down, which is where ``.to(x.dtype)`` stood. A float32 capture that was canonicalised has
  lost its casts, hence the next two.
- operators whose result or digits half precision does not hold: powers, sums, exponentials, sines (a subset of those
  that torch.autocast runs in float32). So the squares of a norm do not overflow.
- what is computed from integers and buffers alone: positions and rotary phases keep their digits.
- routers: their weights, and the rows as they read them. Scores of the best experts are often equal to 3 digits, and
  rounding them would send tokens elsewhere; a router is a small part of the work.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch

from moeify.backends.half_floats import HALF, changes
from moeify.backends.half_types import Types
from moeify.backends.half_weights import cast_weights, positional_buffers, read_wide, router_weights
from moeify.ir.program import Program


@dataclass(frozen=True)
class HalfReport:
    """What the cast did. ``vanished``: weights that became 0, by name; ``rounding``: the largest relative error of a
    weight (its largest difference over its largest value), and of which; ``saturated``: buffers and nodes whose
    "minus infinity" was written as the smallest float32 and is the smallest of the new type now; ``zero_guards``:
    nodes that add or clamp to a constant which is 0 in the new type; ``float32``: weights that stay.
    """

    dtype: torch.dtype
    vanished: dict[str, int]
    rounding: float
    roundest: str
    saturated: tuple[str, ...]
    zero_guards: tuple[str, ...]
    float32: tuple[str, ...]

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        text = [f"{name}: weights rounded by at most {self.rounding:.1e} of the largest of their tensor"]
        if self.roundest:
            text[0] += f" ({self.roundest})"
        if self.vanished:
            worst = max(self.vanished, key=self.vanished.__getitem__)
            total = sum(self.vanished.values())
            text.append(f"{total} weights in {len(self.vanished)} tensors became 0, most in {worst}")
        if self.zero_guards:
            text.append(f"a constant that guards against 0 is 0 now in {', '.join(self.zero_guards)}")
        if self.float32:
            text.append(f"{len(self.float32)} weights stay float32, routers among them")
        return "; ".join(text)


def to_half(program: Program, dtype: torch.dtype) -> tuple[Program, HalfReport]:
    """The twin, which shares what has not changed, and the report. The program given stays as it is.

    Raises Refused naming the weights that do not fit the type, or the operator that cannot be cast.
    """
    if dtype not in HALF:
        raise ValueError(f"{dtype} is no half precision")
    if program.pending:
        program.materialise()
    routers = router_weights(program)
    wide = routers | read_wide(program.graph) | positional_buffers(program)
    memo, cast = cast_weights(program, dtype, wide)
    module = copy.deepcopy(program.graph_module, memo)
    twin = dataclasses.replace(
        program,
        graph_module=module,
        inputs=tuple(
            dataclasses.replace(spec, dtype=dtype) if changes(spec.dtype, dtype) else spec for spec in program.inputs
        ),
        example=half_inputs(program.example, dtype),
        blocks=list(program.blocks),
        near_misses=list(program.near_misses),
        history=list(program.history),
        selected=dict(program.selected),
        provenance=dict(program.provenance),
    )
    types = Types(twin, dtype, routers)
    types.propagate()
    module.recompile()
    saturated = (*cast.saturated, *types.saturated)
    report = HalfReport(
        dtype, cast.vanished, cast.rounding, cast.roundest, saturated, tuple(types.zero_guards), tuple(sorted(wide))
    )
    return twin, report


def half_inputs(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Inputs of a program in the types of its twin."""
    return tuple(t.to(dtype) if changes(t.dtype, dtype) else t for t in inputs)
