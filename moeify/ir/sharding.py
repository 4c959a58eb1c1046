"""Which experts a rank holds, and the record of a sharded program.

Experts are cut as ``torch.chunk`` and ``DTensor``'s ``Shard(0)`` cut them: ceil(E / W) consecutive experts to a rank,
the last ones fewer or none, so that a checkpoint can describe the stacked weights as one sharded tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from moeify.ir.program import Program
from moeify.ir.weights import WeightRecipe

KEY = "sharding"  # of Program.provenance
MODES = ("dropless", "capacity")  # how rows travel: all of them, or as many as buffers of one size take


@dataclass(frozen=True)
class ShardedBlock:
    """One block: E experts over rows of D values, K per token. ``parameters`` are its stacked weights by full name."""

    block: str  # Block.anchor
    experts: int
    width: int
    top_k: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Sharding:
    """What shard-experts did: for how many ranks, whose experts are here, how rows travel."""

    ranks: int
    rank: int
    mode: str
    blocks: tuple[ShardedBlock, ...]

    @property
    def parameters(self) -> frozenset[str]:
        """The names of all stacked weights."""
        return frozenset(name for block in self.blocks for name in block.parameters)


def sharding(program: Program) -> Sharding | None:
    """The record of a sharded program, None for one that is not."""
    return program.provenance.get(KEY)


def most(experts: int, ranks: int) -> int:
    """The experts of the fullest rank."""
    return -(-experts // ranks)


def share(experts: int, ranks: int, rank: int) -> tuple[int, int]:
    """The first expert of a rank and the one after its last."""
    each = most(experts, ranks)
    return min(rank * each, experts), min((rank + 1) * each, experts)


def capacity(rows: int, experts: int, factor: float) -> int:
    """Rows that one rank with so many rows may send to one expert: ``ceil(factor * rows / E)``, at least one.

    ``factor`` is what it says in decimals: 1.1 of 10 rows are 11.
    """
    return max(1, -(-(Fraction(str(factor)) * rows) // experts))


def fitting_ranks(experts: int) -> list[int]:
    """The numbers of ranks that share the experts evenly."""
    return [ranks for ranks in range(1, experts + 1) if experts % ranks == 0]


def cut(program: Program, name: str, start: int, stop: int) -> None:
    """Keep the experts from ``start`` to ``stop`` of a stacked weight: a recipe, computed by ``materialise``.

    A weight that is a recipe still is computed whole, one at a time, and cut; one that is there already is held until
    then. Nothing but the part remains.
    """
    held = program.parameter(name)
    before = program.pending.get(name)
    if before is not None:
        whole, sources = before.compute, before.sources
    else:
        kept = held.detach()
        whole, sources = (lambda: kept), ()
    shape = (stop - start, *held.shape[1:])
    recipe = WeightRecipe(name, shape, sources, lambda *given: whole(*given)[start:stop].clone(), held.dtype)
    program.add_recipe(recipe, held.requires_grad)
