"""Which activation a block has: its row function is run in float64 on random numbers and compared with the known ones.

Parameters inside are drawn at random too: PReLU as it is initialised equals leaky_relu(0.25), which proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify.ir.activations import TABLE
from moeify.match.axes import MixesRows
from moeify.match.ops import CASTS, DROPOUT, arguments, hints, name_of
from moeify.match.rows import extract

# Far below the distance between any two names (gelu and gelu_tanh: 5e-4), above float32 constants in the graph (1e-7).
_TOLERANCE = 2e-6

HALVES = ("halves", "swapped", "interleaved", "interleaved-swapped")


@dataclass(frozen=True)
class Probe:
    """What the row function was found to be.

    ``activation`` is None when it has no name; ``layout`` says how a fused up layer holds gate and up (halves: gate
    first); ``gate`` which of two up layers is the gate (0 or 1); ``nonlinear`` is False for an affine function or a
    mere norm.
    """

    activation: str | None
    gated: bool
    layout: str | None = None
    gate: int = 0
    pointwise: bool = True
    nonlinear: bool = True


def probe(
    nodes: Sequence[fx.Node],
    sources: Sequence[tuple[fx.Node, int]],
    hidden: tuple[fx.Node, int],
    root: nn.Module,
) -> Probe:
    """Raises MixesRows when there is no row function or its widths do not fit."""
    region = extract(nodes, sources, hidden, root)
    draw = torch.Generator().manual_seed(0)
    constants = _constants(region, draw)
    widths = [hints(node)[axis] for node, axis in sources]
    width = hints(hidden[0])[hidden[1]]
    _compare_with_captured(region, nodes, sources, hidden, constants, draw)
    inputs = [_rows(w, draw) for w in widths]
    h = _run(region, inputs, constants)
    _check_rows_apart(region, inputs, h, constants)
    fused = len(inputs) == 1 and widths[0] == 2 * width
    if any(w != width for w in widths) and not fused:
        raise MixesRows(f"the hidden width changes from {widths[0]} to {width} between the linear layers")
    if not _is_nonlinear(region, inputs, h, constants):
        return Probe(None, gated=False, nonlinear=False)
    learnable = any(isinstance(t, nn.Parameter) for t in _attributes(region).values())
    if fused:
        found = None if learnable else _fused_name(h, inputs[0], width)
        return found or Probe(None, True, _dependence(region, inputs[0], width, constants))
    pointwise = _is_pointwise(region, inputs, h, constants)
    if len(inputs) == 1:
        name = None if learnable else _plain_name(h, inputs[0])
        return Probe(name, gated=False, pointwise=pointwise)
    found = None if learnable else _gated_name(h, inputs)
    return found or Probe(None, gated=True, gate=1, pointwise=pointwise)


def halves(layout: str, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(start, stop, step) of gate and up in the output of a fused layer."""
    if layout.startswith("interleaved"):
        first, second = (0, 2 * width, 2), (1, 2 * width, 2)
    else:
        first, second = (0, width, 1), (width, 2 * width, 1)
    return (second, first) if layout.endswith("swapped") else (first, second)


def _rows(width: int, draw: torch.Generator) -> Tensor:
    """Eight rows, from small to large numbers."""
    scale = torch.tensor([0.3, 0.7, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0], dtype=torch.float64)
    return torch.randn(8, width, generator=draw, dtype=torch.float64) * scale[:, None]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not torch.isfinite(b).all():
        return False
    return float((a - b).abs().max()) <= _TOLERANCE * max(1.0, float(b.abs().max()))


def _plain_name(h: Tensor, u: Tensor) -> str | None:
    return next((name for name, act in TABLE.items() if name != "identity" and _same(act.function(u), h)), None)


def _gated_name(h: Tensor, inputs: list[Tensor]) -> Probe | None:
    for name, act in TABLE.items():
        for gate in (0, 1):
            if _same(act.function(inputs[gate]) * inputs[1 - gate], h):
                return Probe(name, gated=True, gate=gate)
    return None


def _fused_name(h: Tensor, u: Tensor, width: int) -> Probe | None:
    for layout in HALVES:
        (a, b, s), (c, d, t) = halves(layout, width)
        gate, up = u[:, a:b:s], u[:, c:d:t]
        for name, act in TABLE.items():
            if _same(act.function(gate) * up, h):
                return Probe(name, gated=True, layout=layout)
    return None


def _dependence(region: fx.GraphModule, u: Tensor, width: int, constants: dict[str, Any]) -> str:
    """The layout of a fused layer whose function has no name, from which columns a hidden unit depends on."""
    u = u.clone().requires_grad_()
    h = _run(region, [u], constants)
    candidates = {"halves", "interleaved"}
    for unit in {0, width // 2, width - 1}:
        (grad,) = torch.autograd.grad(h[:, unit].sum(), u, retain_graph=True)
        columns = set(grad.abs().amax(0).nonzero().flatten().tolist())
        if not columns <= {unit, width + unit}:
            candidates.discard("halves")
        if not columns <= {2 * unit, 2 * unit + 1}:
            candidates.discard("interleaved")
    if not candidates:
        raise MixesRows("the two halves of the up layer are combined in an unknown way")
    return sorted(candidates)[0]


def _is_nonlinear(region: fx.GraphModule, inputs: list[Tensor], h: Tensor, constants: dict[str, Any]) -> bool:
    """Neither affine nor unchanged by the scale of its inputs (a norm)."""
    zero = _run(region, [torch.zeros_like(u) for u in inputs], constants)
    flipped = _run(region, [u.flip(0) for u in inputs], constants)
    both = _run(region, [u + u.flip(0) for u in inputs], constants)
    if _same(both + zero, h + flipped):
        return False
    # A norm alone is odd around its bias and blind to scale; with an activation before it, it is not odd.
    mirrored = _run(region, [-u for u in inputs], constants)
    larger = _run(region, [2 * u for u in inputs], constants)
    odd = _same(mirrored - zero, zero - h)
    blind = bool((larger - h).abs().max() <= 1e-2 * h.abs().max())
    return not (odd and blind and not _is_pointwise(region, inputs, h, constants))


def _is_pointwise(region: fx.GraphModule, inputs: list[Tensor], h: Tensor, constants: dict[str, Any]) -> bool:
    """Hidden unit j depends on unit j of the inputs alone."""
    half = h.shape[1] // 2
    moved = [torch.cat([u[:, :half], u[:, half:].flip(0) - 1.5], 1) for u in inputs]
    if any(u.shape[1] != h.shape[1] for u in inputs):
        return True
    return _same(_run(region, moved, constants)[:, :half], h[:, :half]) if half else True


def _check_rows_apart(region: fx.GraphModule, inputs: list[Tensor], h: Tensor, constants: dict[str, Any]) -> None:
    few = _run(region, [u[2:5] for u in inputs], constants)
    if few.shape[0] != 3 or not _same(few, h[2:5]):
        raise MixesRows("a row of the hidden value depends on other rows")


def _compare_with_captured(
    region: fx.GraphModule,
    nodes: Sequence[fx.Node],
    sources: Sequence[tuple[fx.Node, int]],
    hidden: tuple[fx.Node, int],
    constants: dict[str, Any],
    draw: torch.Generator,
) -> None:
    """The row function does to every row what the captured nodes do to it, in the same order of rows."""
    env: dict[fx.Node, Any] = {}
    rows = []
    for node, axis in sources:
        tensor = torch.randn(hints(node), generator=draw, dtype=torch.float64)
        env[node] = tensor
        rows.append(tensor.movedim(axis, -1).flatten(0, -2))
    captured = _evaluate(nodes, env, constants)[hidden[0]].movedim(hidden[1], -1).flatten(0, -2)
    if not _same(_run(region, rows, constants), captured):
        raise MixesRows("rows change places between the linear layers")


def _run(region: fx.GraphModule, inputs: Sequence[Tensor], constants: dict[str, Any]) -> Tensor:
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    nodes = [node for node in region.graph.nodes if node.op == "call_function"]
    (result,) = region.graph.output_node().all_input_nodes
    return _evaluate(nodes, dict(zip(placeholders, inputs)), constants)[result]


def _evaluate(nodes: Sequence[fx.Node], env: dict[fx.Node, Any], constants: dict[str, Any]) -> dict[fx.Node, Any]:
    """Run nodes in float64: casts between floating types and dropout are left out."""

    def read(node: fx.Node) -> Any:
        if node in env:
            return env[node]
        if node.op == "get_attr":
            return constants[str(node.target)]
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, int)):
            return int(val.node.hint) if isinstance(val, torch.SymInt) else val
        return env.setdefault(node, step(node))

    def step(node: fx.Node) -> Any:
        name = name_of(node)
        args: Any = fx.map_arg(arguments(node), read)
        kwargs: Any = fx.map_arg(node.kwargs, read)
        if name in DROPOUT:
            return args[0]
        if name in CASTS and args[0].is_floating_point():
            val = node.meta.get("val")
            if val is None or val.dtype.is_floating_point:
                return args[0]
        if name in ("native_layer_norm",):
            raise MixesRows("native_layer_norm stands between the linear layers")
        if name == "view":
            return args[0].reshape(args[1])
        with torch.device("cpu"):
            target: Any = node.target
            return target(*args, **kwargs)

    for node in nodes:
        env[node] = step(node)
    return env


def _attributes(region: fx.GraphModule) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(region.named_parameters(remove_duplicate=False))
    found.update(region.named_buffers(remove_duplicate=False))
    return found


def _constants(region: fx.GraphModule, draw: torch.Generator) -> dict[str, Any]:
    """Parameters at random, buffers as they are; floating-point ones in float64."""
    made: dict[str, Any] = {}
    for name, tensor in _attributes(region).items():
        if isinstance(tensor, nn.Parameter) or (tensor.device.type == "meta" and tensor.is_floating_point()):
            made[name] = 0.5 + torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
        else:
            made[name] = tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.detach().cpu()
    return made
