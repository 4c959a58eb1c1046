"""A stable sort of which only the first k are read is a TopK of k."""

from __future__ import annotations

import numpy
import onnx_ir as ir


def narrow_topk(model: ir.Model) -> int:
    """Rewrite in place; gives how many.

    Before:  values, order = TopK(scores, E);  Slice(values, 0, k, axis, 1);  Slice(order, 0, k, axis, 1)
    After:   values, order = TopK(scores, k)

    The readers of a value must all be such slices of one k, or nothing is done: routers sort all E scores, because
    torch.topk promises nothing about equal ones.
    """
    done = 0
    for node in list(model.graph):
        if node.op_type != "TopK" or node.domain or not _is_sorted(node):
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        slices = [(output, use.node) for output in node.outputs for use in output.uses()]
        lengths = {_first(use, axis) for _, use in slices}
        kept = lengths.pop() if len(lengths) == 1 else None
        if kept is None or kept > _size(node, axis) or any(output.is_graph_output() for output in node.outputs):
            continue
        if len(slices) > len(node.outputs) and any(use.outputs[0].is_graph_output() for _, use in slices):
            continue  # one value cannot have the names of two outputs
        for output in node.outputs:
            _skip(model, output, [use for source, use in slices if source is output])
            _narrow(output, axis, kept)
        node.replace_input_with(1, _constant(model, kept))
        done += 1
    return done


def _skip(model: ir.Model, output: ir.Value, slices: list[ir.Node]) -> None:
    """Let the readers of the slices read ``output``, which takes the name of the first."""
    if not slices:
        return
    results = [use.outputs[0] for use in slices]
    name = results[0].name
    for use, result in zip(slices, results):
        ir.convenience.replace_all_uses_with(result, output, replace_graph_outputs=True)
        model.graph.remove(use, safe=True)
    output.name = name


def _narrow(output: ir.Value, axis: int, kept: int) -> None:
    """Shape inference is held to shapes that are there, of values that nothing reads as well."""
    if output.shape is not None:
        shape = list(output.shape)
        shape[axis] = kept
        output.shape = ir.Shape(shape)


def _is_sorted(node: ir.Node) -> bool:
    return "sorted" not in node.attributes or node.attributes["sorted"].as_int() == 1


def _size(node: ir.Node, axis: int) -> int:
    """Of the axis: a slice may ask for more than there is, TopK may not. 0 when it is not known."""
    data = node.inputs[0]
    size = data.shape[axis] if data is not None and data.shape is not None else None
    return size if isinstance(size, int) else 0


def _first(node: ir.Node, axis: int) -> int | None:
    """k when the node keeps the first k along the axis."""
    if node.op_type != "Slice" or node.domain or len(node.inputs) < 4:
        return None
    values = [_ints(value) for value in node.inputs[1:]]
    if None in values or any(len(value) != 1 for value in values if value is not None):
        return None
    start, stop, on, *step = [value[0] for value in values if value is not None]
    data = node.inputs[0]
    rank = len(data.shape) if data is not None and data.shape is not None else None
    same = on == axis or (rank is not None and on % rank == axis % rank)
    return stop if same and start == 0 and stop > 0 and step in ([], [1]) else None


def _ints(value: ir.Value | None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(v) for v in tensor.numpy().reshape(-1)]


def _constant(model: ir.Model, value: int) -> ir.Value:
    name = f"moeify.topk.{value}"
    if name not in model.graph.initializers:
        tensor = ir.Tensor(numpy.array([value], dtype=numpy.int64), name=name)
        model.graph.register_initializer(
            ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]))
        )
    return model.graph.initializers[name]
