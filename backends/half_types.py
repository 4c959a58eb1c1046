"""The graph of a half-precision twin: a cast wherever half and float32 meet, and constants that the type holds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from moeify.backends.half_floats import ASSERT, HALF, as_infinity, float_type, is_cast
from moeify.errors import Refused
from moeify.ir.program import Program
from moeify.ir.where import source_line

_aten = torch.ops.aten
_FLOAT32 = frozenset(
    {
        "pow", "square", "sum", "prod", "cumsum", "cumprod", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p",
        "rsqrt", "reciprocal", "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "norm", "linalg_vector_norm", "var",
        "std", "var_mean", "std_mean", "logsumexp", "logcumsumexp",
    }
)  # fmt: skip
# Constants below the smallest number become a plain 0 in these; as eps of a norm they stay what they are.
_GUARDS = (
    _aten.add.Tensor, _aten.add.Scalar, _aten.clamp_min.default, _aten.clamp.default, _aten.clamp_min_.default,
    _aten.div.Tensor, _aten.div.Scalar,
)  # fmt: skip


class Types:
    """Runs the graph on fake tensors, with the example's sizes, and puts a cast wherever half and float32 meet."""

    def __init__(self, program: Program, dtype: torch.dtype, routers: set[str]) -> None:
        self.program, self.dtype, self.routers = program, dtype, routers
        self.saturated: list[str] = []
        self.zero_guards: list[str] = []
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._values: dict[fx.Node, Any] = {}
        self._made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def propagate(self) -> None:
        graph = self.program.graph
        examples = iter(self.program.example)
        for node in list(graph.nodes):
            if node.target == ASSERT:
                graph.erase_node(node)  # it asserts the old types
            elif node.op in ("placeholder", "get_attr"):
                real = next(examples) if node.op == "placeholder" else _attribute(self.program, node)
                fake = self._mode.from_tensor(real, static_shapes=True) if isinstance(real, torch.Tensor) else real
                self._note(node, fake)
            elif node.op != "output":
                self._rename_half(node)
                self._meet(node)
                self._saturate(node)
                self._note(node, self._run(node))
        self._skip_detours()
        graph.eliminate_dead_code()

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        try:
            with self._mode, torch.no_grad():
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except Exception as error:  # whatever the operator raises for types that it does not take
            name = str(self.dtype).removeprefix("torch.")
            reason = str(error).strip().splitlines()[0]
            raise Refused(
                f"{node.target} cannot be cast to {name}: {reason}", where=source_line(node), hint="export in float32"
            ) from error

    def _note(self, node: fx.Node, value: Any) -> None:
        """Keep what the node gives, and give its ``val`` the new types: the old one has the symbolic sizes."""
        self._values[node] = value
        if "val" not in node.meta:
            return
        old, spec = pytree.tree_flatten(node.meta["val"])
        new = pytree.tree_leaves(value)
        if len(old) == len(new):
            node.meta["val"] = pytree.tree_unflatten([_retyped(o, n) for o, n in zip(old, new)], spec)

    def _rename_half(self, node: fx.Node) -> None:
        """A half type that the program names itself becomes the new one."""

        def rename(value: Any) -> Any:
            return self.dtype if isinstance(value, torch.dtype) and value in HALF else value

        node.args, node.kwargs = pytree.tree_map(rename, node.args), pytree.tree_map(rename, node.kwargs)

    def _meet(self, node: fx.Node) -> None:
        """One float type among the inputs: float32 for what needs it, else half if a half tensor is one."""
        floats = [n for n in node.all_input_nodes if float_type(self._values[n]) is not None]
        types = {float_type(self._values[n]) for n in floats}
        needs = _needs_float32(node)
        if len(types) < 2 and not (needs and self.dtype in types):
            return
        sized = {float_type(self._values[n]) for n in floats if self._values[n].dim()} or types
        reads_router = any(n.op == "get_attr" and n.target in self.routers for n in floats)
        target = self.dtype if self.dtype in sized and not reads_router and not needs else torch.float32
        for source in floats:
            if float_type(self._values[source]) != target:
                node.replace_input_with(source, self._cast(source, target, node))

    def _cast(self, source: fx.Node, target: torch.dtype, before: fx.Node) -> fx.Node:
        if (source, target) not in self._made:
            with self.program.graph.inserting_before(before):
                cast = self.program.graph.call_function(_aten.to.dtype, (source, target))
            if isinstance(val := source.meta.get("val"), torch.Tensor):
                cast.meta["val"] = _retyped(val, val.new_empty(()).to(target))
            cast.meta |= {k: before.meta[k] for k in ("nn_module_stack", "stack_trace") if k in before.meta}
            self._values[cast] = self._run(cast)
            self._made[source, target] = cast
        return self._made[source, target]

    def _saturate(self, node: fx.Node) -> None:
        """Constants that the new type does not hold: the largest instead of infinity, and a note of new zeros."""
        half = any(float_type(self._values[n]) == self.dtype for n in node.all_input_nodes)
        limits = torch.finfo(self.dtype)
        bound = limits.max if half else as_infinity(torch.float32)
        found = [False]

        def clamp(value: Any) -> Any:
            if not isinstance(value, float) or not math.isfinite(value) or abs(value) <= bound:
                return value
            found[0] = True
            return math.copysign(limits.max, value)

        args, kwargs = pytree.tree_map(clamp, node.args), pytree.tree_map(clamp, node.kwargs)
        if found[0]:
            node.args, node.kwargs = args, kwargs
            self.saturated.append(node.name)
        smallest = limits.smallest_normal * limits.eps  # subnormal
        tiny = any(isinstance(v, float) and 0 < abs(v) < smallest / 2 for v in [*node.args, *node.kwargs.values()])
        if half and tiny and node.target in _GUARDS:
            self.zero_guards.append(node.name)

    def _skip_detours(self) -> None:
        """half -> float32 -> half is the value itself."""
        for (source, target), cast in self._made.items():
            if target != self.dtype or not is_cast(source):
                continue
            origin = source.args[0]
            if isinstance(origin, fx.Node) and float_type(self._values[origin]) == self.dtype:
                cast.replace_all_uses_with(origin)


def _needs_float32(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    name = node.target._schema.name.removeprefix("aten::")
    squares = name == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]
    return squares or name in _FLOAT32


def _attribute(program: Program, node: fx.Node) -> Any:
    value: Any = program.graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _retyped(old: Any, new: Any) -> Any:
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or old.dtype == new.dtype:
        return old
    if isinstance(old, FakeTensor):
        with old.fake_mode:
            return old.to(new.dtype)
    return old.to(new.dtype)
