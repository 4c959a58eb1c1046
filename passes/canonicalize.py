"""canonicalize: one spelling for each construct, so that find-ffn needs one pattern for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moeify.ir.program import Program
from moeify.pipeline.base import Log, Pass

aten = torch.ops.aten

_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}
_WHOLE = 2**63 - 1


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop checks, dead code and nodes that return their operand; in-place operators become functional.

    Before:  h = linear(x, w); r = relu_(h); d = dropout(r, 0.0, False); y = linear(d, v)
    After:   h = linear(x, w); r = relu(h); y = linear(r, v)

    An in-place operator stays where another name for the same memory is read afterwards, and where it writes to an
    input or a buffer. The function is unchanged to the last bit, gradients too.
    """

    name: ClassVar[str] = "canonicalize"

    def apply(self, program: Program, log: Log) -> None:
        graph = program.graph
        checks = _drop_checks(graph)
        functional, kept = _functionalise(graph)
        written = _written_storage(graph)
        no_ops = _drop_no_ops(graph, written)
        before = len(graph.nodes)
        graph.eliminate_dead_code(is_impure_node=_is_impure)
        dead = before - len(graph.nodes)
        program.graph_module.recompile()
        for count, what in (
            (checks, "checks dropped"),
            (functional, "in-place operators made functional"),
            (kept, "in-place operators kept: they write to memory that has another reader"),
            (no_ops, "nodes dropped that return their operand"),
            (dead, "dead nodes dropped"),
        ):
            if count:
                log(f"{count} {what}")


def _name(node: fx.Node) -> str:
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.partition("::")[2]
    return ""


def _drop_checks(graph: fx.Graph) -> int:
    count = 0
    for node in reversed(list(graph.nodes)):
        guard = node.op == "call_module" and str(node.target) == "_guards_fn"
        if (guard or _name(node) in _CHECKS) and not node.users:
            graph.erase_node(node)
            count += 1
    return count


def _is_impure(node: fx.Node) -> bool:
    return _writes(node) != () or node.is_impure()


# --- in-place operators -------------------------------------------------------------------------------------------


def _schema(node: fx.Node) -> torch._C.FunctionSchema | None:
    target = node.target
    return target._schema if node.op == "call_function" and isinstance(target, torch._ops.OpOverload) else None


def _operands(node: fx.Node, write: bool) -> Iterable[fx.Node]:
    """The operands that a node writes to, or that its result may share memory with."""
    schema = _schema(node)
    if schema is None:
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node) and not write:
            yield node.args[0]  # getitem
        return
    for position, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if info is None or (write and not info.is_write):
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, fx.Node):
                yield item


# These may return their operand or a copy; their schema says either "alias" or nothing.
_MAYBE_ALIAS = {
    "reshape",
    "contiguous",
    "to",
    "flatten",
    "dropout",
    "type_as",
    "_reshape_alias",
    "expand_as",
    "feature_dropout",
}


def _writes(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(_operands(node, write=True))


class _Storage:
    """Which nodes share memory, conservatively: by the alias annotations of operators."""

    def __init__(self, graph: fx.Graph) -> None:
        self.root: dict[fx.Node, fx.Node] = {}
        self.members: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            shared = list(_operands(node, write=False))
            transposes = _name(node) == "einsum" and len(node.all_input_nodes) == 1
            if transposes or _name(node) in _MAYBE_ALIAS:
                shared += node.all_input_nodes[:1]
            root = self.root[shared[0]] if shared and node.op != "output" else node
            self.root[node] = root
            self.members.setdefault(root, []).append(node)


def _functionalise(graph: fx.Graph) -> tuple[int, int]:
    """In-place operators whose operand has no other name that is read later; (made functional, kept)."""
    candidates = [node for node in graph.nodes if _writes(node)]
    if not candidates:
        return 0, 0
    order = {node: index for index, node in enumerate(graph.nodes)}
    storage = _Storage(graph)
    done = kept = 0
    for node in candidates:
        twin = _functional(node)
        operand = node.args[0] if node.args else None
        if twin is None or not isinstance(operand, fx.Node) or not _is_free(node, operand, storage, order):
            kept += 1
            continue
        node.target = twin
        later = [user for user in operand.users if user is not node and order[user] > order[node]]
        for user in later:
            user.replace_input_with(operand, node)
        done += 1
    return done, kept


def _is_free(node: fx.Node, operand: fx.Node, storage: _Storage, order: dict[fx.Node, int]) -> bool:
    """Only names made from ``operand`` or ``node`` after the write are read after it."""
    root = storage.root[operand]
    if root.op in ("get_attr", "placeholder"):
        return False
    now = order[node]
    for other in storage.members[root]:
        if other in (operand, node) or order[other] > now:
            continue
        if any(order[user] > now for user in other.users):
            return False
    return True


def _functional(node: fx.Node) -> Any:
    """The functional twin of an in-place operator that gives the same dtype and shape, None if there is none."""
    target, schema = node.target, _schema(node)
    name = _name(node)
    if schema is None or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name[:-1], None)
    twin = getattr(packet, target._overloadname, None) if packet is not None else None  # type: ignore[union-attr]
    if twin is None or [a.name for a in twin._schema.arguments] != [a.name for a in schema.arguments]:
        return None
    pointwise = torch.Tag.pointwise in twin.tags or name in ("dropout_", "hardswish_", "hardsigmoid_")
    operand = node.args[0]
    val = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not pointwise or not isinstance(val, torch.Tensor) or not val.is_floating_point():
        return None
    for other in node.all_input_nodes:
        tensor = other.meta.get("val")
        if isinstance(tensor, torch.Tensor) and (tensor.dtype != val.dtype or tensor.dim() > val.dim()):
            return None
    return twin


def _written_storage(graph: fx.Graph) -> set[fx.Node]:
    """Every node that shares memory with one that is written to."""
    if not any(_writes(node) for node in graph.nodes):
        return set()
    storage = _Storage(graph)
    roots = {storage.root[operand] for node in graph.nodes for operand in _writes(node)}
    return {node for node, root in storage.root.items() if root in roots}


# --- nodes that return their operand ------------------------------------------------------------------------------


def _drop_no_ops(graph: fx.Graph, written: set[fx.Node]) -> int:
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node in written or not _is_no_op(node):
            continue
        operand = node.args[0]
        if any(user.op == "output" for user in node.users) and operand.op in ("placeholder", "get_attr"):
            continue
        node.replace_all_uses_with(operand)
        graph.erase_node(node)
        count += 1
    return count


def _is_no_op(node: fx.Node) -> bool:
    name = _name(node)
    args: Any = node.args
    operand = args[0] if args else None
    if not isinstance(operand, fx.Node):
        return False
    before, after = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if name == "dropout":
        return bool(args[1] == 0.0)
    if name == "alias":
        return True
    if name in ("to", "_to_copy", "type_as"):
        same = before.dtype == after.dtype and before.device == after.device and before.layout == after.layout
        return bool(same) and node.kwargs.get("memory_format") in (None, torch.preserve_format)
    if name == "slice":
        _, start, end, step = (list(args[1:]) + [0, None, None, 1][len(args) - 1 :])[:4]
        return start in (0, None) and end in (_WHOLE, None) and step == 1
    if name == "expand":
        return all(isinstance(size, int) and size == -1 for size in args[1])
    return False
