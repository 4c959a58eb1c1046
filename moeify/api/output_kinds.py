"""What the outputs of a program are: scores that predict something, or values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.fitting.padding import mask_of_rows, masks_of
from moeify.ir.language import is_causal, language_of
from moeify.ir.program import Program

Kind = Literal["next tokens", "tokens", "classes", "embeddings", "values"]
PREDICTIONS = ("next tokens", "tokens", "classes")


@dataclass(frozen=True)
class OutputKind:
    """One output in pytree order. ``mask`` and ``ids`` are positions of inputs [batch, sequence]: ``mask`` is zero
    where a row of the output is padding, ``ids`` holds the tokens that scores of next tokens are held against.
    """

    name: str
    kind: Kind
    mask: int | None = None
    ids: int | None = None


def output_kinds(program: Program, classes: bool) -> list[OutputKind]:
    """The kinds of all outputs.

    ``next tokens`` and ``tokens`` are scores for each word of the vocabulary [batch, sequence, vocabulary], of a causal
    model and of any other (``ir.language``). ``classes`` are scores [batch, classes] or [batch, sequence, classes] in
    an output named logits, as transformers names them, or with ``classes`` any output of two dimensions: two
    dimensions alone do not tell scores from an embedding. Other floating-point outputs of several columns are
    ``embeddings``, and the rest is ``values``. Raises BadOption when ``classes`` names nothing.
    """
    names, values = _outputs(program)
    inputs = [spec.name for spec in program.inputs]
    masks = masks_of(program.graph, program.inputs)
    language = language_of(program)
    kinds = []
    for position, (name, node) in enumerate(zip(names, values)):
        val: Tensor = node.meta["val"]
        if language is not None and position == language.output:
            causal = is_causal(program.graph_module, program, language)
            mask = None if language.mask is None else inputs.index(language.mask)
            ids = inputs.index(language.ids) if causal else None
            kinds.append(OutputKind(name, "next tokens" if causal else "tokens", mask, ids))
            continue
        several = val.is_floating_point() and val.dim() > 1 and not _is_one(val.shape[-1])
        kind: Kind = "embeddings" if several else "values"
        named = name.rpartition(".")[2] == "logits" and val.dim() <= 3
        if several and (named or (classes and val.dim() == 2)):
            kind = "classes"
        kinds.append(OutputKind(name, kind, mask_of_rows(program.graph, masks, node) if val.dim() > 1 else None))
    if classes and not any(one.kind == "classes" for one in kinds):
        raise BadOption("the model has no output [batch, classes]", hint=f"its outputs: {', '.join(names)}")
    return kinds


def _outputs(program: Program) -> tuple[list[str], list[Any]]:
    """Names and nodes of the tensors that the program gives, in pytree order."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(_tree(program))
    found = [(path, node) for path, node in leaves if isinstance(getattr(node, "meta", {}).get("val"), Tensor)]
    names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in found]
    return [name if name else "output" for name in names], [node for _, node in found]


def _tree(program: Program) -> Any:
    """The output as the model gives it, with nodes in the place of tensors."""
    value = program.graph.output_node().args[0]
    tree = getattr(program.graph._codegen, "pytree_info", None)
    if tree is None or tree.out_spec is None:
        return value
    return torch.utils._pytree.tree_unflatten(torch.utils._pytree.tree_leaves(value), tree.out_spec)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
