"""A function of torch, compiled by TVM and run beside torch."""

from __future__ import annotations

import torch
import tvm
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from moeify.backends.tvm.families import Families
from moeify.backends.tvm.importing import Imported, import_graph
from moeify.backends.tvm.machine import machine
from moeify.ir.program import InputSpec
from tests.tvm_functions import Run, calling

NOTHING = Families({})


def exported(module: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, list[InputSpec]]:
    """The graph, dynamic in the first dimension of every input, and its inputs."""
    dims = tuple({0: torch.export.Dim.DYNAMIC} if x.dim() else None for x in inputs)
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=dims, strict=False)
    graph = program.module(check_guards=False)
    specs = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            shape = tuple(int(s) if is_concrete_int(s) else f"d{s}" for s in value.shape)
            specs.append(InputSpec(node.name, value.dtype, shape))
    return graph, specs  # type: ignore[return-value]


def imported(module: nn.Module, *inputs: Tensor, families: Families = NOTHING) -> Imported:
    graph, specs = exported(module, *inputs)
    return import_graph(graph, specs, machine(), families)


def running(one: Imported) -> Run:
    """Compiled by TVM's own pipeline."""
    return calling(tvm.compile(one.mod, target=machine().target), one.weights)
