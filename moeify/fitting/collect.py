"""Running a program on data and keeping what its dense blocks do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from moeify import __version__
from moeify.errors import BadInputSpec, BadOption, Refused
from moeify.fitting.objective import Objective, objective_of
from moeify.fitting.padding import mask_of_rows, masks_of
from moeify.fitting.reservoir import Reservoir
from moeify.fitting.statistics import Statistics
from moeify.frontend.reasons import first_line
from moeify.ir.block import Block
from moeify.ir.hidden import hidden
from moeify.ir.metadata import outputs
from moeify.ir.profile import Profile
from moeify.ir.program import Program
from moeify.verify.measure import in_float32, widened

SAMPLES = 4096  # rows of a block's input that are kept
TOP = 10  # A = K_a of CMoE (arXiv 2502.04416): 10 in its code, where F is 11008, whatever F is here
TOKENS = 32768  # rows of a block after which no further batch is run
_FIRINGS = 10  # of the average unit, at the least
_REASON = f"a unit of average rate then fires {_FIRINGS} times"
_ROWS = 1024  # of a block's hidden value that are in memory, and summed, at a time


class Steps(Protocol):
    def advance(self, n: int = 1) -> None:
        """``n`` batches are done."""


def collect(
    program: Program,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    samples: int = SAMPLES,
    top: int | None = None,
    gradients: bool = False,
    tokens: int = TOKENS,
    seed: int = 0,
    source: str = "the data",
    progress: Steps | None = None,
) -> Profile:
    """The profile of the selected blocks of a program that find-ffn and select have seen.

    ``batches`` are inputs of the program, read until a block has seen ``tokens`` rows. Memory holds one batch, the
    sums, and ``samples`` rows of each block's input. ``top`` is A, by default 10 (half the units of a block that has
    fewer than 20). With ``gradients`` the loss of ``objective_of`` gives the importance of units. Rows that an integer
    input named ``*mask*`` [batch, sequence] switches off do not count.

    Raises BadInputSpec when the program does not run on the data or there are too few: a unit of average rate fires in
    A / F of the rows, and with ten times that often its rate is known to a third (the relative deviation of a count of
    10), so 10 F / A rows are needed. Raises BadOption for numbers that make no sense, Refused for NaN.
    """
    blocks = program.converted()
    narrowest = min(block.d_ff for block in blocks)
    if top is None:
        top = min(TOP, max(1, narrowest // 2))
    if not 1 <= top <= narrowest:
        raise BadOption(f"top is {top}: it must be from 1 to {narrowest}, the hidden units of the narrowest block")
    for name, value in (("samples", samples), ("tokens", tokens)):
        if value < 1:
            raise BadOption(f"the number of {name} is {value}: it must be at least 1")
    for block in blocks:
        if tokens < _needed(block, top):
            raise BadOption(
                f"{tokens} tokens are too few for {block.d_ff} hidden units",
                where=block.path,
                hint=f"choose at least {_needed(block, top)}: {_REASON}",
            )
    found = {block.anchor: Statistics(block.d_ff, top, Reservoir(samples, seed)) for block in blocks}
    ran: list[tuple[Tensor, ...]] = []
    loss = "none"
    with torch.set_grad_enabled(gradients), in_float32(program) as module:
        objective = None
        if gradients:
            loss, objective = objective_of(program, module)
        watch = _Watch(program, module, found, objective)
        for batch in batches:
            _run(watch, batch)
            ran.append(batch)
            if progress is not None:
                progress.advance()
            if max(one.tokens for one in found.values()) >= tokens:
                break
    _check(blocks, found, top, source)
    most = max(one.tokens for one in found.values())
    facts = {
        "source": source,
        "sha256": digest(program),
        "seed": str(seed),
        "tokens": str(most),
        "loss": loss,
        "moeify": __version__,
    }
    return Profile({anchor: one.profile() for anchor, one in found.items()}, ran, top, facts)


def digest(program: Program) -> str:
    """SHA-256 of the names, types, shapes and values of all parameters: the model, whatever file it came in."""
    made = hashlib.sha256()
    for name, value in sorted(program.graph_module.named_parameters(remove_duplicate=False)):
        made.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        made.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


@dataclass(frozen=True)
class _Site:
    """One call of a block in the graph. ``mask`` is the position of the input that switches its rows off."""

    block: Block
    call: int
    input: str
    output: str
    feature: int  # axis of the features, of input and output
    mask: int | None


class _Watch(fx.Interpreter):
    """Runs the program and hands the rows of every call to the block's statistics."""

    def __init__(
        self,
        program: Program,
        module: fx.GraphModule,
        found: Mapping[str, Statistics],
        objective: Objective | None,
    ) -> None:
        super().__init__(module)
        self._found = found
        self._objective = objective
        self._sites = list(_sites(program))
        self._parameters: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
        self._parameters.update(module.named_parameters(remove_duplicate=False))
        self._inputs: dict[str, Tensor] = {}
        self._ends: list[tuple[_Site, Tensor, Tensor]] = []  # where gradients wait: rows of x, and a leaf added to y
        self._batch: tuple[Tensor, ...] = ()

    def observe(self, batch: tuple[Tensor, ...]) -> None:
        """One batch through the program, and back."""
        self._batch = widened(batch)
        output = self.run(*self._batch)
        if self._objective is not None:
            loss = self._objective(output, self._batch)
            grads = torch.autograd.grad(loss, [leaf for _, _, leaf in self._ends], allow_unused=True)
            for (site, x_ND, leaf), grad in zip(self._ends, grads):
                dy = torch.zeros_like(leaf) if grad is None else grad
                self._add(site, x_ND, self._rows(site, dy))
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
                    self._add(site, x_ND, None)
                else:
                    leaf = torch.zeros_like(value, requires_grad=True)
                    self._ends.append((site, x_ND, leaf))
                    value = value + leaf
        if any(site.input == n.name for site in self._sites):
            self._inputs[n.name] = value
        return value

    def _rows(self, site: _Site, value: Tensor) -> Tensor:
        """[N, features], without rows of padding."""
        rows = value.movedim(site.feature, -1).flatten(0, -2)
        return rows if site.mask is None else rows[self._batch[site.mask].flatten() != 0]

    def _add(self, site: _Site, x_ND: Tensor, dy_ND: Tensor | None) -> None:
        block, one = site.block, self._found[site.block.anchor]
        with torch.no_grad():
            down = block.down.read(self._parameters[block.down.parameter]).float()
            for start in range(0, len(x_ND), _ROWS):
                x = x_ND[start : start + _ROWS]
                gradient = None if dy_ND is None else dy_ND[start : start + _ROWS].float() @ down
                one.add(hidden(block, self._parameters.__getitem__, x), gradient)
                one.inputs.add(x, site.call)


def _sites(program: Program) -> Iterator[_Site]:
    nodes = {node.name: node for node in program.graph.nodes}
    masks = masks_of(program.graph, program.inputs)
    ends = outputs(program.graph)
    for block in program.converted():
        for call, site in enumerate(block.calls):
            end = ends[block.anchor, call]
            # find-ffn leaves the features of a moe.ffn last, and those of a region where they were.
            first = block.layout == "channels-first" and end.target != torch.ops.moeify.ffn.default
            mask = None if first else mask_of_rows(program.graph, masks, nodes[site.input])
            yield _Site(block, call, site.input, end.name, 1 if first else -1, mask)


def _run(watch: _Watch, batch: tuple[Tensor, ...]) -> None:
    try:
        watch.observe(batch)
    except (RuntimeError, IndexError, ValueError) as error:
        raise BadInputSpec(f"the model does not run on the data: {first_line(error)}") from error


def _needed(block: Block, top: int) -> int:
    """Rows in which a unit of average rate, top / F, is expected to fire ten times."""
    return math.ceil(_FIRINGS * block.d_ff / top)


def _check(blocks: Iterable[Block], found: Mapping[str, Statistics], top: int, source: str) -> None:
    for block in blocks:
        one = found[block.anchor]
        if one.tokens < _needed(block, top):
            raise BadInputSpec(
                f"{source}: {one.tokens} rows are too few to know how often each of {block.d_ff} hidden units fires",
                where=block.path,
                hint=f"give data that make at least {_needed(block, top)} rows (tokens, patches): {_REASON}",
            )
        if not one.finite():
            raise Refused("the hidden values are NaN or infinite on the data", where=block.path)
