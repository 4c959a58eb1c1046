"""Running a program on data and keeping what its dense blocks do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from moeify import __version__
from moeify.errors import BadInputSpec, BadOption, Refused
from moeify.fitting.objective import objective_of
from moeify.fitting.reservoir import Reservoir
from moeify.fitting.statistics import Statistics
from moeify.fitting.watch import Site, Watch
from moeify.ir.block import Block
from moeify.ir.hidden import hidden
from moeify.ir.profile import Profile
from moeify.ir.program import Program
from moeify.ir.recipe import TOKENS
from moeify.verify.measure import in_float32

SAMPLES = 4096  # rows of a block's input that are kept
TOP = 10  # A = K_a of CMoE (arXiv 2502.04416): 10 in its code, where F is 11008, whatever F is here
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
        watch = Watch(program, module, objective)

        def add(site: Site, x_ND: Tensor, dy_ND: Tensor | None) -> None:
            block, one = site.block, found[site.block.anchor]
            with torch.no_grad():
                down = block.down.read(watch.parameters[block.down.parameter]).float()
                for start in range(0, len(x_ND), _ROWS):
                    x = x_ND[start : start + _ROWS]
                    gradient = None if dy_ND is None else dy_ND[start : start + _ROWS].float() @ down
                    one.add(hidden(block, watch.parameters.__getitem__, x), gradient)
                    one.inputs.add(x, site.call)

        for batch in batches:
            watch.observe(batch, add)
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
