"""A torch.export graph as a Relax function whose parameters are apart from its code."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch import fx
from torch.utils import _pytree as pytree
from tvm import relax

from moeify.backends.tvm.conversions.constants import Constants
from moeify.backends.tvm.conversions.decompose import decompose
from moeify.backends.tvm.conversions.functionalize import functionalize
from moeify.backends.tvm.conversions.table import CONVERSIONS
from moeify.backends.tvm.conversions.translation import Translation
from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.families import Families
from moeify.backends.tvm.machine import Machine
from moeify.backends.tvm.shapes import Symbols
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights
from moeify.errors import Refused
from moeify.ir.emit import arguments
from moeify.ir.program import InputSpec
from moeify.ir.where import module_path


@dataclass(frozen=True)
class Imported:
    """``mod`` has the function ``main(*inputs, *weights)``, whose attribute ``num_input`` is how many inputs it has.

    It gives a tuple of the outputs of the graph in pytree order. ``weights`` are in the order of the parameters.
    """

    mod: tvm.IRModule
    weights: Weights


def import_graph(module: fx.GraphModule, inputs: Sequence[InputSpec], machine: Machine, families: Families) -> Imported:
    """Translate the unlifted graph of an export (``ExportedProgram.module(check_guards=False)``).

    ``inputs`` describe its placeholders: dimensions of one name are one size. What ``families`` has a lowering for
    becomes that; the rest becomes operators of Relax. An embedding and a linear layer that share a weight keep it
    both as it is and packed. Raises Refused that lists every operator without a conversion.
    """
    module = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    functionalize(module)
    decompose(module, CONVERSIONS)
    constants = Constants(module)
    weights = Weights(constants.tensor)
    symbols = Symbols()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders]
    shapes = symbols.bind([value.shape for value in values], [spec.shape for spec in inputs])
    variables = [
        relax.Var(node.name, tensor_type(shape, value.dtype))
        for node, shape, value in zip(placeholders, shapes, values, strict=True)
    ]
    builder = relax.BlockBuilder()
    translation = Translation(Emitter(builder, machine, weights), families, symbols, constants)
    translation.env.update(zip(placeholders, variables))
    # The weights are known when the walk is over: the function is begun with the inputs and gets them then.
    with builder.function("main", variables):
        with builder.dataflow():
            missing = _walk(module.graph, translation)
            outputs = [] if missing else _outputs(module.graph, translation)
            result = builder.emit_output(relax.Tuple(outputs))
        builder.emit_func_output(result)
    if missing:
        raise _refusal(missing, machine)
    mod = builder.get()
    main = mod["main"]
    parameters = [*variables, *(weight.var for weight in weights)]
    mod["main"] = relax.Function(parameters, main.body, main.ret_ty, main.is_pure, main.attrs).with_attr(
        "num_input", len(variables)
    )
    return Imported(mod, weights)


def _walk(graph: fx.Graph, translation: Translation) -> dict[str, list[str]]:
    """Gives the operators that have no conversion, with the paths of the modules that call them."""
    missing: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not _is_free(node, translation) and not _convert(node, translation):
            missing.setdefault(str(node.target), []).append(module_path(node) or "(root)")
    return missing


def _outputs(graph: fx.Graph, translation: Translation) -> list[Any]:
    leaves = pytree.tree_leaves(graph.output_node().args[0])
    return [translation.tensor(leaf) for leaf in leaves if isinstance(leaf, fx.Node)]


def _convert(node: fx.Node, translation: Translation) -> bool:
    """Whether there is a conversion that takes the node; its result goes into the environment."""
    if node.target is operator.getitem:
        several, index = node.args
        assert isinstance(several, fx.Node)
        translation.env[node] = translation.env[several][index]
        return True
    convert = CONVERSIONS.get(node.target)
    result = NotImplemented if convert is None else convert(translation, node, arguments(node))
    if result is NotImplemented:
        # Its readers may have conversions: those that have none are to be in the list as well.
        translation.env[node] = translation.unknown(node.meta["val"])
        return False
    translation.env[node] = translation.conform(result, node.meta["val"])
    return True


def _is_free(node: fx.Node, translation: Translation) -> bool:
    """Whether nothing is to be emitted: sizes, assertions, constants, and what came with an earlier node."""
    if node in translation.env or translation.name(node) is not None:
        return True
    return not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _refusal(missing: dict[str, list[str]], machine: Machine) -> Refused:
    count = len(missing)
    lines = [f"  {name} ({len(paths)}): {', '.join(dict.fromkeys(paths))}" for name, paths in sorted(missing.items())]
    what = "1 operator has" if count == 1 else f"{count} operators have"
    where = " on CUDA" if machine.kind == "cuda" else ""
    return Refused(
        "\n".join([f"{what} no conversion to TVM{where}:", *lines]),
        hint="export it to ONNX Runtime instead: moeify export --to onnxruntime",
    )
