"""Roles and what stands behind them: a graph says ``"ep"``, and a process says at run time who that is.

The graph of a sharded program is the same on every rank because it names a role instead of a process group. A role is
bound to a ``Transport`` once per process; ``only_here`` binds it in one thread, for ranks that are threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from moeify.errors import GroupMismatch, UnboundRole

EXPERTS = "ep"
DATA = "dp"


class Transport(Protocol):
    """A group of ranks that this rank belongs to. Every method is called by all ranks of the group, in one order."""

    @property
    def rank(self) -> int:
        """The position of this rank in the group."""

    @property
    def size(self) -> int:
        """How many ranks the group has."""

    def all_to_all(self, x: Tensor, out_splits: list[int], in_splits: list[int], where: str) -> Tensor:
        """Rows ``in_splits[r]`` of x go to rank r; ``out_splits[r]`` rows come from it. In the order of the ranks.

        ``where`` is the block on whose behalf, for errors.
        """

    def all_reduce(self, x: Tensor, where: str) -> Tensor:
        """The sum over the ranks, in the place of x."""


_BOUND: dict[str, Transport] = {}
_LOCAL = threading.local()


def bind(role: str, transport: Transport) -> None:
    """Let the role mean this group, in the whole process. A role that means another group already is an error."""
    taken = _BOUND.get(role)
    if taken is not None and taken != transport:
        raise GroupMismatch(
            f"the role {role!r} is bound to another group in this process already",
            hint="bind all programs to one mesh, or call moeify.distributed.unbind() between them",
        )
    _BOUND[role] = transport


def unbind() -> None:
    """Forget every role of the process."""
    _BOUND.clear()


@contextmanager
def only_here(transports: Mapping[str, Transport]) -> Iterator[None]:
    """The roles in this thread. The backward pass of a CPU graph runs in the thread that calls it, so it sees them."""
    before = getattr(_LOCAL, "bound", {})
    _LOCAL.bound = {**before, **transports}
    try:
        yield
    finally:
        _LOCAL.bound = before


def transport(role: str, size: int, where: str) -> Transport:
    """What the role means here, for a graph made for ``size`` ranks. Raises UnboundRole or GroupMismatch."""
    found = getattr(_LOCAL, "bound", {}).get(role) or _BOUND.get(role)
    if found is None:
        raise UnboundRole(
            f"the graph exchanges rows with the group {role!r}, which is bound to nothing in this process",
            where=where,
            hint="call moeify.distributed.bind(program, mesh) and use the module that it returns",
        )
    if found.size != size:
        raise GroupMismatch(
            f"this graph was made for an {role!r} group of {size} ranks, but the bound group has {found.size}",
            where=where,
            hint=f"start {size} ranks, or shard the program again with shard-experts{{ranks={found.size}}}",
        )
    return found
