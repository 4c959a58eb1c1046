"""The weights of a half-precision twin: which stay float32, what rounding does to the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeify.backends.calls import find_calls
from moeify.backends.half_floats import ASSERT, WIDE, as_infinity, changes, dtypes, is_cast
from moeify.errors import Refused
from moeify.ir.program import Program

_aten = torch.ops.aten
_VIEWS = (
    _aten.unsqueeze.default, _aten.expand.default, _aten.view.default, _aten.reshape.default, _aten.slice.Tensor,
    _aten.select.int, _aten.permute.default, _aten.transpose.int, _aten.alias.default, _aten.detach.default,
)  # fmt: skip


@dataclass
class Casts:
    vanished: dict[str, int] = dataclasses.field(default_factory=dict)
    saturated: list[str] = dataclasses.field(default_factory=list)
    rounding: float = 0.0
    roundest: str = ""


def router_weights(program: Program) -> set[str]:
    """The names of the float weights of routers that the graph reads."""
    prefixes = tuple(f"{call.block}.router." for call in find_calls(program.graph))
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and str(n.target).startswith(prefixes)}
    return {name for name in names if program.parameter(name).dtype.is_floating_point}


def read_wide(graph: fx.Graph) -> set[str]:
    """Weights that are read by casts to float32 alone, perhaps through views."""
    return {
        str(node.target)
        for node in graph.nodes
        if node.op == "get_attr" and (readers := list(_readers(node))) and all(map(_widens, readers))
    }


def positional_buffers(program: Program) -> set[str]:
    """Float buffers of which everything is computed from them, integers and other buffers: frequencies, not masks."""
    positional: set[fx.Node] = set()
    for node in program.graph.nodes:
        value = program.parameter(str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        if node.op == "get_attr":
            holds = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
        elif node.op == "placeholder":
            holds = isinstance(value, torch.Tensor) and not value.is_floating_point()
        else:
            holds = node.op != "output" and all(source in positional for source in node.all_input_nodes)
        if holds:
            positional.add(node)
    buffers = [node for node in positional if node.op == "get_attr"]
    return {
        str(node.target)
        for node in buffers
        if program.parameter(str(node.target)).is_floating_point()
        and (readers := list(_readers(node)))
        and all(reader in positional for reader in readers)
    }


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if user.target in _VIEWS:
            yield from _readers(user)
        elif user.target != ASSERT:
            yield user


def _widens(node: fx.Node) -> bool:
    return is_cast(node) and any(value in WIDE for value in dtypes(node))


def _named_tensors(program: Program) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and the constants that the graph reads, each once."""
    module = program.graph_module
    seen: set[int] = set()
    constants = ((str(n.target), program.parameter(str(n.target))) for n in program.graph.nodes if n.op == "get_attr")
    for name, tensor in [*module.named_parameters(), *module.named_buffers(), *constants]:
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def cast_weights(program: Program, dtype: torch.dtype, wide: set[str]) -> tuple[dict[int, Any], Casts]:
    """(id of each tensor -> what stands for it in the twin, what happened). Raises Refused naming what overflows."""
    memo: dict[int, Any] = {}
    cast, too_large = Casts(), []
    kept = {id(program.parameter(name)) for name in wide}
    for name, tensor in _named_tensors(program):
        new = torch.float32 if id(tensor) in kept else dtype
        masks = id(tensor) in kept and bool((tensor.detach().abs() >= as_infinity(tensor.dtype)).any())
        if masks:
            limits = torch.finfo(dtype)
            memo[id(tensor)] = tensor.detach().float().clamp(limits.min, limits.max)
            cast.saturated.append(name)
            continue
        if not changes(tensor.dtype, new):
            memo[id(tensor)] = tensor
            continue
        with torch.no_grad():
            half = _cast_one(name, tensor.detach(), new, cast)
        if half is None:
            too_large.append(f"{name} ({float(tensor.detach().abs().max()):.3g})")
            continue
        memo[id(tensor)] = torch.nn.Parameter(half, tensor.requires_grad) if _is_parameter(tensor) else half
    if too_large:
        more = f" and {len(too_large) - 5} more" if len(too_large) > 5 else ""
        raise Refused(
            f"{len(too_large)} weights do not fit {str(dtype).removeprefix('torch.')}, whose largest value is "
            f"{torch.finfo(dtype).max:.6g}: {', '.join(too_large[:5])}{more}",
            hint="bfloat16 has the range of float32",
        )
    return memo, cast


def _cast_one(name: str, tensor: torch.Tensor, dtype: torch.dtype, cast: Casts) -> torch.Tensor | None:
    """None for values that overflow. The largest float32 values stand for infinity in masks and saturate."""
    half = tensor.to(dtype)
    overflowed = half.isinf()
    if overflowed.any() and (overflowed := overflowed & tensor.isfinite()).any():
        stands_for_infinity = tensor.abs() >= as_infinity(tensor.dtype)
        if (overflowed & ~stands_for_infinity).any():
            return None
        limits = torch.finfo(dtype)
        half = torch.where(overflowed, half.clamp(limits.min, limits.max), half)
        cast.saturated.append(name)
        return half
    vanished = int(tensor.count_nonzero() - half.count_nonzero())
    if vanished:
        cast.vanished[name] = vanished
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    # Infinities are equal on both sides and their difference is NaN; a tensor that holds some has no scale.
    rounding = float((half.to(tensor.dtype) - tensor).abs().max()) / largest if 0 < largest < math.inf else 0.0
    if rounding > cast.rounding:
        cast.rounding, cast.roundest = rounding, name
    return half


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)
