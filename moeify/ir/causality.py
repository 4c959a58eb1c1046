"""Whether a program keeps its tokens from seeing those after them, as decoders do."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moeify.ir.emit import arguments
from moeify.ir.program import Program

_aten = torch.ops.aten
_RECURRENT = (_aten.lstm.input, _aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input)
_TRIANGLES = (_aten.tril.default, _aten.triu.default)
_COMPARISONS = (_aten.le.Tensor, _aten.lt.Tensor, _aten.ge.Tensor, _aten.gt.Tensor)


def causal_node(program: Program) -> fx.Node | None:
    """The first node that makes the program causal, None where there is none.

    That is attention that says so itself, a triangle of ones, a stored triangular matrix, positions compared with
    positions, or a recurrent layer that runs one way. One such node is enough, also where only a part of the model is a
    decoder. A mask that is an input of the program is not seen.
    """
    return next((node for node in program.graph.nodes if _is_causal(program, node)), None)


def _is_causal(program: Program, node: fx.Node) -> bool:
    if node.op == "get_attr":
        value = node.meta.get("val")
        # An attention mask has two equal axes; weights may too, so only what is not trained is looked at.
        stored = node.users and isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-1] == value.shape[-2]
        return bool(stored) and _is_triangle(program.parameter(str(node.target)))
    if node.target == _aten.scaled_dot_product_attention.default:
        return bool(arguments(node)["is_causal"])
    if node.target in _RECURRENT:
        return not arguments(node)["bidirectional"]
    if node.target in _COMPARISONS:
        left, right = node.args[:2]
        return left is not right and _is_position(left) and _is_position(right) and _has_two_axes(node)
    return node.target in _TRIANGLES


def _is_triangle(matrix: Tensor) -> bool:
    """One value on and below the diagonal, another above it."""
    size = matrix.shape[-1]
    if matrix.requires_grad or size < 2 or matrix.device.type == "meta":
        return False
    last = matrix.reshape(-1, size, size)[-1]
    above = torch.ones(size, size, dtype=torch.bool, device=last.device).triu(1)
    low, high = last[~above], last[above]
    return bool((low == low[0]).all() and (high == high[0]).all() and low[0] != high[0])


def _is_position(value: object) -> bool:
    """Whether it is made of torch.arange and no other tensor but inputs."""
    left, seen, found = [value], set(), False
    while left:
        node = left.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        result = node.meta.get("val")
        if isinstance(result, Tensor) and result.is_floating_point():
            return False
        found = found or node.target in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)
        if not isinstance(result, (int, torch.SymInt)):
            left.extend(node.all_input_nodes)
    return found


def _has_two_axes(node: fx.Node) -> bool:
    sizes = node.meta["val"].shape
    return len(sizes) >= 2 and not any(isinstance(size, int) and size == 1 for size in sizes[-2:])
