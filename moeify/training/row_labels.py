"""Which label belongs to which row of a block: of an example, of a token, or the token itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moeify.backends.calls import find_calls
from moeify.ir.program import Program
from moeify.ir.token_ids import embedded_ids, ids_of_rows, views_of


@dataclass(frozen=True)
class RowLabels:
    """What is known of the rows of a program's blocks, by their paths: those in ``by_example`` see the rows of the
    first example, then those of the second; ``tokens`` gives the input [batch, sequence] whose ids a block's rows are
    of.
    """

    by_example: tuple[str, ...]
    tokens: Mapping[str, str]

    def of(self, batch: Mapping[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """Labels for ``RoutingRecorder.next``. ``labels`` are [batch], a class for each example, or have one for each
        token; where there are none, a token's class is the token. Blocks that they do not fit have none.
        """
        ids = {path: batch[name] for path, name in self.tokens.items()}
        if labels is None:
            return ids
        if labels.dim() == 1:
            return dict.fromkeys(self.by_example, labels)
        return {path: labels for path, one in ids.items() if one.shape == labels.shape}


def row_labels(program: Program, paths: Mapping[str, str]) -> RowLabels:
    """``paths`` gives the module path of an anchor."""
    placeholders = program.graph.find_nodes(op="placeholder")
    ids = [one for one in embedded_ids(program.graph) if one.is_input]
    nodes = {node.name: node for node in program.graph.nodes}
    by_example: dict[str, None] = {}
    tokens: dict[str, str] = {}
    examples = placeholders[0].meta["val"].shape[0] if placeholders[0].meta["val"].dim() else None
    for call in find_calls(program.graph):
        path, rows = paths.get(call.block, call.block), nodes[call.rows]
        if examples is not None and any(
            statically_known_true(same.meta["val"].shape[0] == examples) for same in views_of(rows)
        ):
            by_example[path] = None
        found = ids_of_rows(ids, rows)
        if found is not None:
            tokens[path] = program.inputs[placeholders.index(found.placeholder)].name
    return RowLabels(tuple(by_example), tokens)
