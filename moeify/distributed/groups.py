"""The groups of ranks that this rank is in, as transports, whatever carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeify.distributed.board import Board
from moeify.ir.roles import DATA, EXPERTS, Transport


def named(ranks: Sequence[int]) -> str:
    """Some ranks in a message: ``rank 1``, ``ranks 1, 2``."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


@dataclass(frozen=True)
class Groups:
    """One rank's view of a mesh.

    ``by_role`` holds ``ep`` (over which experts are spread) and, on a mesh of two dimensions, ``dp`` (ranks with the
    same experts). ``ranks`` are all ranks of the mesh, ``rank`` is this one; ``seconds`` is how long an exchange may
    take. Groups over which a bind has failed, or a rank was lost, are not used again.
    """

    by_role: Mapping[str, Transport]
    rank: int
    ranks: Sequence[int]
    board: Board = field(compare=False)
    seconds: float = 300.0
    in_threads: bool = False  # whoever started the threads has bound their roles

    @property
    def experts(self) -> Transport:
        return self.by_role[EXPERTS]

    @property
    def data(self) -> Transport | None:
        return self.by_role.get(DATA)

    @property
    def size(self) -> int:
        """The ranks of the whole mesh."""
        return len(self.ranks)
