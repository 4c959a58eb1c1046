"""Before the first exchange the ranks compare what they are about to run.

Without it, splits that do not match end the receiving process without a Python error, and a graph made for other ranks
gives wrong numbers in silence. One rank reads what all have written to the board and writes the verdict, so that N
ranks cost 2 N notes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping

from torch import fx

from moeify.distributed.groups import Groups, named
from moeify.distributed.lost import not_come
from moeify.errors import DistributedError, GroupMismatch, RankLost, RanksDiffer
from moeify.ir.program import Program
from moeify.ir.sharding import Sharding

Facts = dict[str, str]
_MARGIN = 5.0  # seconds that the verdict may come later than the last note
_ERRORS: Mapping[str, type[DistributedError]] = {
    error.__name__: error for error in (GroupMismatch, RankLost, RanksDiffer)
}


def graph_hash(graph: fx.Graph) -> str:
    """Of the nodes, operators and arguments.

    Not of sizes, which may differ where E is not divisible by the ranks, and not of the names of process groups that
    lower-exchange puts in: two columns of a mesh have two.
    """
    digest = hashlib.sha256()
    for node in graph.nodes:
        collective = getattr(node.target, "namespace", "") == "_c10d_functional"
        args = node.args[:-1] if collective else node.args
        digest.update(f"{node.op} {node.name} {node.target} {args} {node.kwargs}\n".encode())
    return digest.hexdigest()[:12]


def facts(program: Program, sharding: Sharding, groups: Groups) -> Facts:
    """What must be equal on all ranks, the most telling first, and this rank's own complaint."""
    ep = groups.experts
    complaint = ""
    if sharding.ranks == ep.size and sharding.rank != ep.rank:
        complaint = (
            f"rank {groups.rank} is number {ep.rank} of its group and holds the experts of number {sharding.rank}"
        )
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in program.graph_module.parameters()})
    return {
        "group size": str(ep.size),
        "number of ranks in the graph": str(sharding.ranks),
        "dtype": " and ".join(dtypes),
        "number of experts": _distinct([block.experts for block in sharding.blocks]),
        "model width": _distinct([block.width for block in sharding.blocks]),
        "top-k": _distinct([block.top_k for block in sharding.blocks]),
        "mode": sharding.mode,
        "graph": graph_hash(program.graph),
        "complaint": complaint,
    }


def shake(mine: Facts, groups: Groups, number: int) -> None:
    """Compare with all ranks. Every rank raises the same error when they differ or one does not come in time.

    ``number`` is that of this meeting, from the board's ``turn``: taken before anything can fail on one rank alone.
    """
    if groups.size == 1:
        _raise(_verdict({groups.rank: mine}))
        return
    board, leader = groups.board, groups.ranks[0]
    board.put(f"facts-{number}", groups.rank, json.dumps(mine))
    if groups.rank == leader:
        notes = board.wait(f"facts-{number}", groups.ranks, groups.seconds)
        missing = [rank for rank in groups.ranks if rank not in notes]
        verdict = _missing(groups, missing) if missing else _verdict({r: json.loads(notes[r]) for r in groups.ranks})
        board.put(f"verdict-{number}", leader, json.dumps(verdict))
    else:
        # The first rank waits for the others from when it has come itself.
        came = board.wait(f"facts-{number}", [leader], groups.seconds)
        answer = board.wait(f"verdict-{number}", [leader], groups.seconds + _MARGIN) if came else {}
        verdict = json.loads(answer[leader]) if answer else _missing(groups, [leader])
    if verdict:
        board.leave(groups.rank)
    _raise(verdict)


def _verdict(notes: Mapping[int, Facts]) -> list[str]:
    """[] when all agree, else the error's class, text and hint."""
    first = next(iter(notes.values()))
    for name in first:
        by_value: dict[str, list[int]] = defaultdict(list)
        for rank, note in notes.items():
            by_value[note[name]].append(rank)
        if name == "complaint":
            if first_complaint := next((note[name] for note in notes.values() if note[name]), ""):
                hint = "shard the program on each rank with its own rank, or bind an unsharded one"
                return ["GroupMismatch", first_complaint, hint]
        elif len(by_value) > 1:
            return ["RanksDiffer", f"the ranks do not run one program: {_differ(name, by_value)}", _SAME]
    size, made_for = first["group size"], first["number of ranks in the graph"]
    if size != made_for:
        what = f"this graph was made for an 'ep' group of {made_for} ranks, but the bound group has {size}"
        return ["GroupMismatch", what, f"start {made_for} ranks per group, or bind an unsharded program"]
    return []


_SAME = "start every rank from the same file, with the same options and versions"


def _differ(name: str, by_value: Mapping[str, list[int]]) -> str:
    """The common value first."""
    common = Counter({value: len(ranks) for value, ranks in by_value.items()}).most_common()
    parts = [f"{value} on {named(by_value[value])}" for value, _ in common]
    return f"{name} is {', '.join(parts[:-1])} and {parts[-1]}"


def _missing(groups: Groups, ranks: list[int]) -> list[str]:
    blame = not_come(groups.board, ranks, "bind", groups.seconds)
    return ["RankLost", blame.what, blame.hint]


def _raise(verdict: list[str]) -> None:
    if verdict:
        kind, what, hint = verdict
        raise _ERRORS[kind](what, hint=hint)


def _distinct(values: list[int]) -> str:
    return " and ".join(map(str, sorted(set(values))))
