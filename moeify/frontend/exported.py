"""Programs that were captured elsewhere: what a ``.pt2`` says about its own inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from moeify.errors import NotExportable
from moeify.frontend.inputs import Example

EXPORTED = "moeify_exported"  # key of GraphModule.meta under which ``load`` leaves the ExportedProgram


def exported_program(module: nn.Module) -> ExportedProgram | None:
    """The program a module was read from, or None."""
    meta = getattr(module, "meta", None)
    return meta.get(EXPORTED) if isinstance(meta, dict) else None


def exported_examples(exported: ExportedProgram) -> list[Example]:
    """The example inputs in the archive, dynamic where the program is; empty when it holds none.

    Raises NotExportable for programs whose inputs are not tensors.
    """
    if exported.example_inputs is None:
        return []
    tensors = torch.utils._pytree.tree_leaves(exported.example_inputs)
    user = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if not all(isinstance(spec.arg, TensorArgument) for spec in user) or not all(
        isinstance(t, Tensor) for t in tensors
    ):
        raise NotExportable(
            "the archive takes inputs that are not tensors", hint="export it with tensors as its only inputs"
        )
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    labels: dict[str, str] = {}
    examples = []
    for spec, tensor in zip(user, tensors):
        dims: list[int | str] = []
        for i, size in enumerate(values[spec.arg.name].shape):
            constant = size if isinstance(size, int) else size.node.maybe_as_int()
            wanted = ("batch", "seq")[i] if i < 2 else f"{spec.arg.name}_{i}"
            dims.append(int(constant) if constant is not None else _label(labels, str(size), wanted, spec.arg.name))
        examples.append(Example(spec.arg.name, tensor, tuple(dims)))
    return examples


def _label(labels: dict[str, str], symbol: str, wanted: str, name: str) -> str:
    """One name for each symbol."""
    if symbol not in labels:
        labels[symbol] = wanted if wanted not in labels.values() else f"{name}_{wanted}"
    return labels[symbol]
