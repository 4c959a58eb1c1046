"""The names in an ONNX model that its user sees: dimensions, inputs, outputs; and nothing else said about the nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
from torch.utils._pytree import TreeSpec

from moeify.backends.exporting import SYMBOL, rename_symbols
from moeify.ir.program import InputSpec


def name_dimensions(model: ir.Model, inputs: Sequence[InputSpec]) -> None:
    """Give every dimension the user's names in the place of torch's symbols: ``s72*s70`` becomes ``batch*seq``."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for have, want in zip(value.shape, spec.shape, strict=True):
            if isinstance(want, str) and isinstance(have, ir.SymbolicDim) and SYMBOL.fullmatch(str(have.value)):
                names.setdefault(str(have.value), want)
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return ir.SymbolicDim(rename_symbols(str(dim.value), names))


def name_outputs(model: ir.Model, structure: TreeSpec | None, keep: str) -> None:
    """Name the graph's outputs after the structure that the program returns.

    A key of a dict is the output's name, ``last_hidden_state``; nested ones are joined by dots, ``past.0.key``; outputs
    without a key are ``output_0`` and so on by place. A name that is taken gets a number. An output that is an input, a
    constant, another output too or of the domain ``keep`` (whose values are looked up by name) goes through Identity.
    """
    graph = model.graph
    wanted = [path or f"output_{i}" for i, path in enumerate(_paths(structure))] if structure is not None else []
    if len(wanted) != len(graph.outputs):  # None and numbers in the structure are no tensors
        wanted = [f"output_{i}" for i in range(len(graph.outputs))]
    made = {id(value) for value in graph.outputs if value.producer() is not None}  # an output can be an input too
    taken = {value.name for value in _values(model) if id(value) not in made}
    renamed: set[int] = set()
    for i, (value, name) in enumerate(zip(list(graph.outputs), wanted)):
        producer = value.producer()
        if producer is None or producer.domain == keep or id(value) in renamed:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[i] = value = node.outputs[0]
            taken.update(source.name for source in node.inputs if source is not None)
        value.name = _free(name, taken)
        renamed.add(id(value))
        taken.add(value.name)


def _free(name: str, taken: set[str | None]) -> str:
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _paths(structure: TreeSpec, path: str = "", named: bool = False) -> Iterator[str]:
    """The path of each leaf; empty when no key is on it."""
    if structure.is_leaf():
        yield path if named else ""
        return
    children = structure.children()
    keys = _keys(structure.context, len(children))
    for i, child in enumerate(children):
        key = keys[i] if keys is not None else str(i)
        yield from _paths(child, f"{path}.{key}" if path else key, named or keys is not None)


def _keys(context: Any, count: int) -> list[str] | None:
    """The keys of a dict or of a class with fields; None for tuples and lists."""
    fields = getattr(context, "_fields", context)
    if isinstance(fields, (list, tuple)) and len(fields) == count and all(isinstance(key, str) for key in fields):
        return list(fields)
    return None


def clear_notes(model: ir.Model) -> None:
    """Drop the stack traces, module classes and doc strings that torch.onnx writes at every node and value.

    They are most of the file beside the weights, and say where the user's source lies.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.doc_string = None


def _values(model: ir.Model) -> Iterable[ir.Value]:
    graph = model.graph
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
