"""Running the dense program with an eye on what its blocks read, and on the gradients of what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moeify.errors import BadInputSpec
from moeify.fitting.objective import Objective
from moeify.fitting.padding import mask_of_rows, masks_of
from moeify.frontend.reasons import first_line
from moeify.ir.block import Block
from moeify.ir.metadata import outputs
from moeify.ir.program import Program
from moeify.verify.measure import widened


@dataclass(frozen=True)
class Site:
    """One call of a block in the graph. ``mask`` is the position of the input that switches its rows off."""

    block: Block
    call: int
    input: str
    output: str
    feature: int  # axis of the features, of input and output
    mask: int | None


# The rows of a call's input [N, D], and the gradients [N, D] at its output where there is an objective.
Seen = Callable[[Site, Tensor, Tensor | None], None]


class Watch(fx.Interpreter):
    """Runs a program that find-ffn and select have seen; ``observe`` hands over the rows of every call of its blocks.

    ``module`` is the program's graph as ``in_float32`` gives it. With an ``objective``, its gradient at the output of
    each call comes with the rows; grad mode must be on then.
    """

    def __init__(self, program: Program, module: fx.GraphModule, objective: Objective | None = None) -> None:
        super().__init__(module)
        self.parameters: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
        self.parameters.update(module.named_parameters(remove_duplicate=False))
        self._objective = objective
        self._sites = list(_sites(program))
        self._inputs: dict[str, Tensor] = {}
        self._ends: list[tuple[Site, Tensor, Tensor]] = []  # where gradients wait: rows of x, and a leaf added to y
        self._batch: tuple[Tensor, ...] = ()
        self._seen: Seen | None = None

    def observe(self, batch: tuple[Tensor, ...], seen: Seen) -> None:
        """One batch through the program, and back. Rows of padding are left out.

        Raises BadInputSpec when the program does not run on it.
        """
        self._batch, self._seen = widened(batch), seen
        try:
            output = self.run(*self._batch)
            if self._objective is not None:
                loss = self._objective(output, self._batch)
                grads = torch.autograd.grad(loss, [leaf for _, _, leaf in self._ends], allow_unused=True)
                for (site, x_ND, leaf), grad in zip(self._ends, grads):
                    dy = torch.zeros_like(leaf) if grad is None else grad
                    seen(site, x_ND, self._rows(site, dy))
        except (RuntimeError, IndexError, ValueError) as error:
            raise BadInputSpec(f"the model does not run on the data: {first_line(error)}") from error
        finally:
            self._ends.clear()
            self._inputs.clear()

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        # No gradient of a parameter is asked for, so none of what it would need is to be kept.
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for site in self._sites:
            if site.output == n.name:
                x_ND = self._rows(site, self._inputs[site.input].detach())
                if self._objective is None:
                    assert self._seen is not None
                    self._seen(site, x_ND, None)
                else:
                    leaf = torch.zeros_like(value, requires_grad=True)
                    self._ends.append((site, x_ND, leaf))
                    value = value + leaf
        if any(site.input == n.name for site in self._sites):
            self._inputs[n.name] = value
        return value

    def _rows(self, site: Site, value: Tensor) -> Tensor:
        """[N, features], without rows of padding."""
        rows = value.movedim(site.feature, -1).flatten(0, -2)
        return rows if site.mask is None else rows[self._batch[site.mask].flatten() != 0]


def _sites(program: Program) -> Iterator[Site]:
    nodes = {node.name: node for node in program.graph.nodes}
    masks = masks_of(program.graph, program.inputs)
    ends = outputs(program.graph)
    for block in program.converted():
        for call, site in enumerate(block.calls):
            end = ends[block.anchor, call]
            # find-ffn leaves the features of a moe.ffn last, and those of a region where they were.
            first = block.layout == "channels-first" and end.target != torch.ops.moeify.ffn.default
            mask = None if first else mask_of_rows(program.graph, masks, nodes[site.input])
            yield Site(block, call, site.input, end.name, 1 if first else -1, mask)
