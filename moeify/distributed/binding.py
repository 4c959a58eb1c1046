"""A program on ranks: sharded where it is not yet, compared with the other ranks, and bound to its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moeify.distributed.groups import Groups
from moeify.distributed.handshake import facts, shake
from moeify.distributed.lost import telling
from moeify.distributed.processes import SECONDS, groups_of
from moeify.errors import NonFiniteValues
from moeify.ir import roles
from moeify.ir.modes import TrainableGraph
from moeify.ir.program import Program
from moeify.ir.sharding import Sharding, sharding
from moeify.pipeline.runner import run

_ATTRIBUTE = "moeify_binding"


@dataclass(frozen=True)
class Binding:
    """What a bound module knows about its ranks."""

    groups: Groups
    sharding: Sharding


def bind(
    program: Program,
    mesh: DeviceMesh | Groups,
    *,
    options: str = "",
    timeout: float = SECONDS,
    check_inputs: bool = True,
) -> TrainableGraph:
    """The program as a module of this rank, in eval mode, with this rank's experts alone.

    Called on every rank of the mesh, whose dimensions are named ``ep`` and perhaps ``dp``. A program that is not
    sharded yet is sharded over ``ep``; ``options`` are further options of shard-experts, such as ``mode=capacity``. The
    first rank alone checks the shapes of the sharded graph, since all have the same. ``program`` is used up. On the
    CPU an exchange that takes longer than ``timeout`` seconds is an error that names the rank that did not come; Groups
    have a timeout of their own. With ``check_inputs`` a floating-point input that holds NaN or infinity stops its rank,
    and the others hear why.

    Raises RanksDiffer or GroupMismatch, the same on every rank. Whatever shard-experts refuses with, and an error of
    this rank alone, is a RankLost on the ranks that did not meet it themselves.
    """
    groups = mesh if isinstance(mesh, Groups) else groups_of(mesh, timeout)
    turn = groups.board.turn(groups.rank)
    with telling(groups.board, groups.rank):
        if sharding(program) is None:
            run(program, [_shard_experts(groups, options)])
    record = sharding(program)
    assert record is not None
    shake(facts(program, record, groups), groups, turn)
    with telling(groups.board, groups.rank):
        if program.pending:
            program.materialise()
        if not groups.in_threads:
            for role, transport in groups.by_role.items():
                roles.bind(role, transport)
    module = as_bound(program, Binding(groups, record))
    if check_inputs:
        module.register_forward_pre_hook(_refuse_non_finite)
    return module


def as_bound(program: Program, binding: Binding) -> TrainableGraph:
    """The program as a module that knows about its ranks."""
    dropout = tuple(program.provenance.get("attention_dropout", ()))
    module = TrainableGraph(program.graph_module, program.graph, attention_dropout=dropout)
    object.__setattr__(module, _ATTRIBUTE, binding)
    return module


def unbind() -> None:
    """Forget which groups the roles of this process mean. Modules bound before can no longer run."""
    roles.unbind()


def binding_of(module: nn.Module) -> Binding:
    """What ``bind`` left on the module."""
    found = getattr(module, _ATTRIBUTE, None)
    if not isinstance(found, Binding):
        raise TypeError(f"{type(module).__name__} was not made by moeify.distributed.bind")
    return found


def _shard_experts(groups: Groups, options: str) -> str:
    """The pass with its options. Its check takes longer than all the rest of bind."""
    ep = groups.experts
    given = [f"ranks={ep.size}", f"rank={ep.rank}", options, "" if groups.rank == groups.ranks[0] else "check=no"]
    return f"shard-experts{{{','.join(filter(None, given))}}}"


def _refuse_non_finite(module: nn.Module, args: tuple[Any, ...]) -> None:
    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            groups = binding_of(module).groups
            what = f"input {position} of rank {groups.rank} holds NaN or infinity"
            groups.board.stop(groups.rank, what)
            groups.board.leave(groups.rank)
            raise NonFiniteValues(what, hint="look at the data of that rank, or bind with check_inputs=False")
