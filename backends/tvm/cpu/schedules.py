"""The schedule of every function that no one wrote by hand: threads over outer loops, vectors along the innermost.

What is pointwise is computed where it is read. A loop whose length is known and fits vectors is vectorised here; one
whose length is known when it runs is left to LLVM, which makes vectors of it and code for the rest. A reduction over
the innermost axis adds one value after the other; over another axis, vectors go along the innermost.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

# Below this many known iterations a region of threads costs more than it saves: about 5 microseconds.
_SMALL = 4096
_LANES = 16


def schedule(mod: tvm.IRModule) -> tvm.IRModule:
    """Schedule each kernel that is not marked as scheduled."""
    for variable, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
            mod[variable] = scheduled(function)
    return mod


def scheduled(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function, scheduled. One that is no nest of blocks is given back as it is."""
    if not isinstance(function.body, s_tir.SBlockRealize) or function.body.block.name_hint != "root":
        return function  # a call of a library function (argsort) is one block and no nest
    sch = s_tir.Schedule(tvm.IRModule({"main": function}))
    if not _blocks(sch):
        return function
    _inline(sch)
    for block in _blocks(sch):
        loops = sch.get_loops(block)
        if not loops or not _plain(sch, block, loops):
            continue
        kinds = [_kind(sch, loop, block) for loop in loops]
        if all(kind == "spatial" for kind in kinds):
            _pointwise(sch, loops)
        elif all(kind in ("spatial", "reduce") for kind in kinds):
            _reduction(sch, block, loops, kinds)
    # What is computed at two places binds the variables of its Lets twice, which the simplifier does not take.
    return s_tir.transform.ConvertSSA()(sch.mod)["main"].with_attr("tirx.is_scheduled", True)


def _blocks(sch: Any) -> list[Any]:
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _inline(sch: Any) -> None:
    """Compute what is pointwise and read within the function where it is read."""
    for block in _blocks(sch)[:-1]:
        if _becomes_integer(sch, block):
            continue
        try:
            sch.compute_inline(block)
        except s_tir.ScheduleError:  # a reduction, or a result of the function
            continue


def _becomes_integer(sch: Any, block: Any) -> bool:
    """Its floats are made integers where they are read.

    TVM looks for the limits of an integer through the whole expression, and fails at variables of a Let in it.
    """
    readers = [_dtype(sch, reader) for reader in sch.get_consumers(block)]
    return _dtype(sch, block).startswith("float") and any("int" in dtype for dtype in readers)


def _dtype(sch: Any, block: Any) -> str:
    return str(sch.get(block).writes[0].source.dtype)


def _plain(sch: Any, block: Any, loops: list[Any]) -> bool:
    """A chain of loops around one block, whose iterators are the loops."""
    found = sch.get(block)
    return len(found.iter_vars) == len(loops) and all(
        not isinstance(sch.get(loop).body, tirx.SeqStmt) for loop in loops
    )


def _kind(sch: Any, loop: Any, block: Any) -> str:
    """What the loop's iterator is: "spatial", "reduce" or "other"."""
    position = [sch.get(other).loop_var for other in sch.get_loops(block)].index(sch.get(loop).loop_var)
    return {0: "spatial", 2: "reduce"}.get(int(sch.get(block).iter_vars[position].iter_type), "other")


def _extent(sch: Any, loop: Any) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _pointwise(sch: Any, loops: list[Any]) -> None:
    extents = [_extent(sch, loop) for loop in loops]
    if all(extent is not None for extent in extents):
        one = sch.fuse(*loops) if len(loops) > 1 else loops[0]
        total = _extent(sch, one) or 1
        lanes = _lanes(total)
        outer, inner = sch.split(one, [None, lanes]) if lanes > 1 else (one, None)
        if total >= _SMALL:
            sch.parallel(outer)
        if inner is not None:
            sch.vectorize(inner)
        return
    *outer_loops, inner = loops
    lanes = _lanes(extents[-1] or 1)
    if lanes > 1:
        rest, vector = sch.split(inner, [None, lanes])
        sch.vectorize(vector)
        outer_loops = [*outer_loops, rest] if _known(extents[:-1]) * (extents[-1] or 1) < 64 else outer_loops
    if outer_loops and _worth_threads(extents):
        sch.parallel(sch.fuse(*outer_loops) if len(outer_loops) > 1 else outer_loops[0])


def _reduction(sch: Any, block: Any, loops: list[Any], kinds: list[str]) -> None:
    """Spatial loops outside, then reductions; vectors along the last spatial loop where memory is read in its order."""
    extents = [_extent(sch, loop) for loop in loops]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "spatial"]
    reduce = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "reduce"]
    lanes = _lanes(_extent(sch, spatial[-1]) or 1) if spatial else 1
    across = lanes > 1 and _reads_along(sch, block, loops.index(spatial[-1]))
    if across:
        rest, vector = sch.split(spatial[-1], [None, lanes])
        outer = [*spatial[:-1], rest]
        sch.reorder(*outer, *reduce, vector)
        sch.vectorize(vector)
    else:
        outer = spatial
        sch.reorder(*outer, *reduce)
    if outer and _worth_threads(extents):
        sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])
    if (outer or reduce) and reduce:
        init = sch.decompose_reduction(block, reduce[0])
        if across:
            sch.vectorize(sch.get_loops(init)[-1])


def _reads_along(sch: Any, block: Any, position: int) -> bool:
    """Whether the block's iterator of that position is the last index of everything that it reads."""
    found = sch.get(block)
    variable = found.iter_vars[position].var
    return all(read.region[-1].min.same_as(variable) for read in found.reads if read.region)


def _worth_threads(extents: list[int | None]) -> bool:
    """Unknown lengths count as 64 each."""
    total = 1
    for extent in extents:
        total *= extent if extent is not None else 64
    return total >= _SMALL


def _known(extents: list[int | None]) -> int:
    total = 1
    for extent in extents:
        total *= extent or 1
    return total


def _lanes(extent: int) -> int:
    """The widest vector that divides a loop, 1 where none does."""
    return next((lanes for lanes in (_LANES, 8, 4) if extent % lanes == 0), 1)
