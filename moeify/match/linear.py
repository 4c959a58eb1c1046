"""Linear layers in every spelling: linear, addmm, matmul, einsum, 1x1 convolution, with the bias folded in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from moeify.ir.block import WeightRef
from moeify.match.ops import CASTS, SAME, arg, arguments, data_inputs, hints, name_of, shape, value

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class Linear:
    """``node = x @ weight.T + bias`` over one axis. ``problem`` says why its weight cannot be taken, if it cannot.

    ``core`` is the matrix product itself, the same as ``node`` unless a bias was folded in.
    """

    node: fx.Node
    core: fx.Node
    x: fx.Node
    x_axis: int
    out_axis: int
    d_in: int
    d_out: int
    weight: WeightRef | None
    bias: WeightRef | None
    problem: str | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(ref.parameter for ref in (self.weight, self.bias) if ref is not None)


def linears(graph: fx.Graph) -> dict[fx.Node, Linear]:
    """Every linear layer of a graph by its output node."""
    found = {}
    for node in graph.nodes:
        read = _READERS.get(name_of(node))
        linear = read(node) if read else None
        if linear is not None:
            linear = _fold_bias(linear)
            found[linear.node] = linear
    return found


class _Computed(Exception):
    """The weight is not a view of a parameter."""


def weight_ref(node: fx.Node, *extra: tuple) -> WeightRef:
    """A parameter and the views that lead to ``node``, then ``extra`` ones. Raises _Computed with the reason."""
    steps: list[tuple] = []
    top = node
    while node.op != "get_attr":
        name = name_of(node)
        before = arguments(node)[0] if arguments(node) else None
        if not isinstance(before, fx.Node):
            raise _Computed(f"the weight is computed by {name or node.op}")
        rank = len(shape(before))
        if name in ("t", "numpy_T", "mT"):
            steps.append(("t",) if rank == 2 else ("permute", *_swapped(rank, name)))
        elif name in ("transpose", "swapaxes", "swapdims"):
            order = list(range(rank))
            i, j = arguments(node)[1] % rank, arguments(node)[2] % rank
            order[i], order[j] = order[j], order[i]
            steps.append(("permute", *order))
        elif name == "permute":
            steps.append(("permute", *(d % rank for d in arguments(node)[1])))
        elif name in ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten"):
            steps.append(("reshape", *hints(node)))
        elif name == "slice":
            dim = arg(node, 1, "dim", 0) % rank
            size = hints(before)[dim]
            start, stop, step = (arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1))
            start, stop, step = slice(start, stop, step).indices(size)
            steps.append(("slice", dim, start, stop, step))
        elif name in SAME - {"detach"}:
            pass
        elif name in CASTS:
            a, b = value(node), value(before)
            if a is None or b is None or a.dtype != b.dtype:
                raise _Computed(
                    f"the weight is cast to {str(a.dtype if a is not None else '?').removeprefix('torch.')}"
                )
        elif name == "getitem":
            raise _Computed("the weight is a part of a stacked parameter")
        else:
            raise _Computed(f"the weight is computed by {name or node.op} (a parametrization?)")
        node = before
    steps = steps[::-1] + list(extra)
    sizes = hints(top)
    for op, *rest in extra:
        sizes = sizes[::-1] if op == "t" else tuple(rest)
    tensor = value(top)
    if tensor is not None and not tensor.dtype.is_floating_point:
        raise _Computed(f"the weight holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
    return WeightRef(str(node.target), tuple(sizes), _simplified(steps))


def _simplified(steps: list[tuple]) -> tuple[tuple, ...]:
    """Transpositions in one spelling, and none where two cancel."""
    kept: list[tuple] = []
    for step in steps:
        if step == ("permute", 1, 0):
            step = ("t",)
        if step == ("permute", 0, 1):
            continue
        if kept and step == kept[-1] == ("t",):
            kept.pop()
        else:
            kept.append(step)
    return tuple(kept)


def _swapped(rank: int, name: str) -> list[int]:
    order = list(range(rank))
    return order[::-1] if name == "numpy_T" else order[:-2] + order[:-3:-1]


def _is_parameter(node: object) -> bool:
    """It depends on parameters alone, however computed."""
    if not isinstance(node, fx.Node):
        return False
    pending, seen = [node], 0
    while pending:
        node = pending.pop()
        seen += 1
        if node.op == "get_attr":
            continue
        inputs = data_inputs(node) if node.op == "call_function" else []
        if not inputs or seen > 24:
            return False
        pending.extend(inputs)
    return True


def _make(
    node: fx.Node, x: fx.Node, axes: tuple[int, int], weight: fx.Node, bias: object, *extra: tuple
) -> Linear | None:
    problem, ref, bias_ref = None, None, None
    try:
        ref = weight_ref(weight, *extra)
        bias_ref = weight_ref(bias) if isinstance(bias, fx.Node) else None
    except _Computed as reason:
        problem = str(reason)
    x_axis, out_axis = axes
    d_in, d_out = hints(x)[x_axis], hints(node)[out_axis]
    return Linear(
        node,
        node,
        x,
        x_axis % len(shape(x)),
        out_axis % len(shape(node)),
        d_in,
        d_out,
        ref,
        bias_ref,
        problem,
    )


def _linear(node: fx.Node) -> Linear | None:
    x, weight = arguments(node)[:2]
    if not _is_parameter(weight) or len(shape(weight)) != 2:
        return None
    return _make(node, x, (-1, -1), weight, arg(node, 2, "bias"))


def _addmm(node: fx.Node) -> Linear | None:
    bias, x, weight = arguments(node)[:3]
    scaled = node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1
    if scaled or not _is_parameter(weight) or not _is_parameter(bias) or len(shape(bias)) != 1:
        return None
    return _make(node, x, (-1, -1), weight, bias, ("t",))


def _matmul(node: fx.Node) -> Linear | None:
    x, weight = arguments(node)[:2]
    if not _is_parameter(weight) or len(shape(weight)) != 2 or _is_parameter(x) or len(shape(x)) < 2:
        return None
    return _make(node, x, (-1, -1), weight, None, ("t",))


def _einsum(node: fx.Node) -> Linear | None:
    equation, operands = str(arguments(node)[0]).replace(" ", ""), arguments(node)[1]
    if len(operands) != 2 or "->" not in equation:
        return None
    left, out = equation.split("->")
    terms = left.split(",")
    for x, weight, x_term, w_term in (
        (operands[0], operands[1], terms[0], terms[1]),
        (operands[1], operands[0], terms[1], terms[0]),
    ):
        if not _is_parameter(weight) or _is_parameter(x) or len(w_term) != 2:
            continue
        contracted = [c for c in w_term if c in x_term and c not in out]
        made = [c for c in w_term if c in out and c not in x_term]
        if len(contracted) != 1 or len(made) != 1 or "..." in w_term:
            return None
        if x_term.replace(contracted[0], "") != out.replace(made[0], ""):
            return None
        extra = () if w_term == made[0] + contracted[0] else (("t",),)
        axes = (_axis(x_term, contracted[0]), _axis(out, made[0]))
        return _make(node, x, axes, weight, None, *extra)
    return None


def _axis(term: str, letter: str) -> int:
    """Position of a letter, counted from the end where an ellipsis stands before it."""
    before, _, after = term.partition(letter)
    return len(before) if "..." not in before else -len(after) - 1


def _conv(node: fx.Node) -> Linear | None:
    name = name_of(node)
    x, weight = arguments(node)[:2]
    if not _is_parameter(weight):
        return None
    rank = len(shape(weight)) - 2
    if name in _CONVOLUTIONS and rank != _CONVOLUTIONS[name]:
        return None
    if any(size != 1 for size in hints(weight)[2:]):
        return None
    stride, padding = arg(node, 3, "stride", 1), arg(node, 4, "padding", 0)
    if name == "convolution":
        transposed, groups = arguments(node)[6], arguments(node)[8]
    else:
        transposed, groups = False, arg(node, 6, "groups", 1)
    padded = padding not in ("same", "valid") and any(_as_list(padding))
    if transposed or groups != 1 or any(s != 1 for s in _as_list(stride)) or padded:
        return None
    axis = len(shape(x)) - 1 - rank
    return _make(node, x, (axis, axis), weight, arg(node, 2, "bias"), ("reshape", *hints(weight)[:2]))


def _as_list(item: object) -> list:
    return list(item) if isinstance(item, (list, tuple)) else [item]


def _fold_bias(linear: Linear) -> Linear:
    """``(x @ W) + b`` as one linear layer."""
    if linear.bias is not None or linear.problem or len(linear.node.users) != 1:
        return linear
    (add,) = linear.node.users
    if name_of(add) != "add" or add.kwargs.get("alpha", 1) != 1 or len(add.args) != 2:
        return linear
    bias = add.args[1] if add.args[0] is linear.node else add.args[0]
    if (
        not isinstance(bias, fx.Node)
        or bias is linear.node
        or not _is_parameter(bias)
        or hints(add) != hints(linear.node)
    ):
        return linear
    rank, sizes = len(shape(linear.node)), hints(bias)
    padded = (1,) * (rank - len(sizes)) + sizes
    if any(size != (linear.d_out if dim == linear.out_axis else 1) for dim, size in enumerate(padded)):
        return linear
    try:
        ref = weight_ref(bias, ("reshape", linear.d_out)) if len(sizes) != 1 else weight_ref(bias)
    except _Computed:
        return linear
    return Linear(
        add,
        linear.core,
        linear.x,
        linear.x_axis,
        linear.out_axis,
        linear.d_in,
        linear.d_out,
        linear.weight,
        ref,
    )


_READERS: dict[str, Callable[[fx.Node], Linear | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "mm": _matmul,
    "matmul": _matmul,
    "einsum": _einsum,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _conv,
}
LINEAR_NAMES = frozenset(_READERS)
