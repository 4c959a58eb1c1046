"""Saving a bound module on W ranks and loading it on any other number of them.

The files are safetensors, written and read by ``torch.distributed.checkpoint``: they hold nothing that could run, and
every rank touches only what it holds.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moeify.distributed import checkpoint_folder as folders
from moeify.distributed import checkpoint_tensors as tensors
from moeify.distributed.binding import binding_of
from moeify.distributed.checkpoint_folder import State
from moeify.distributed.groups import Groups
from moeify.distributed.lost import explain
from moeify.errors import MoeifyError, NonFiniteWeights, OutputNotWritten, RankLost, StateDictMismatch, UnreadableFile

_WHERE = "checkpoint"


def save(
    module: nn.Module,
    mesh: DeviceMesh,
    folder: str | Path,
    step: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    facts: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``folder/step-0000STEP``. Every rank calls it; the path, when it is there for all.

    ``facts`` are plain data for the one who loads. The last ``keep`` checkpoints stay. Raises NonFiniteWeights before
    anything is written, OutputNotWritten or RankLost; the checkpoints before are untouched then.
    """
    folder = Path(folder)
    groups = binding_of(module).groups
    state = tensors.state_of(module, mesh, optimizer)
    _refuse_non_finite(module, groups, step)
    _one_for_all(groups, "begin", lambda: folders.begin(folder, step))
    with _translated(groups, f"cannot write a checkpoint to {folder}", OutputNotWritten):
        writer = HuggingFaceStorageWriter(str(folders.part_of(folder, step)), save_distributed=True)
        dcp.save(_contiguous(state), storage_writer=writer)
    known = State(step, groups.size, dict(facts or {}))
    _one_for_all(groups, "finish", lambda: folders.finish(folder, known, keep))
    return folders.path_of(folder, step)


def load(
    module: nn.Module, mesh: DeviceMesh, checkpoint: str | Path, *, optimizer: torch.optim.Optimizer | None = None
) -> State:
    """Read one checkpoint, of any number of ranks, into the module and the optimizer. Every rank calls it.

    Raises UnreadableFile, or StateDictMismatch for a checkpoint of another model.
    """
    checkpoint = Path(checkpoint)
    groups = binding_of(module).groups
    state = folders.read_state(checkpoint)
    reader = HuggingFaceStorageReader(str(checkpoint))
    found = read_metadata(reader, checkpoint)
    if optimizer is not None:
        tensors.prepare(module, optimizer, set(found.state_dict_metadata))
    wanted = tensors.state_of(module, mesh, optimizer)
    check(wanted, found, checkpoint)
    with _translated(groups, f"cannot read the checkpoint {checkpoint}", UnreadableFile):
        dcp.load(wanted, storage_reader=reader)
    return state


def read_metadata(reader: HuggingFaceStorageReader, checkpoint: Path) -> Metadata:
    """Names, shapes and places of all tensors. Raises UnreadableFile."""
    from safetensors import SafetensorError

    try:
        return reader.read_metadata()
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UnreadableFile(
            f"the checkpoint {checkpoint} is damaged: {error}", hint="go on from an earlier one, or copy it again"
        ) from error


def tensor_metadata(found: Metadata) -> dict[str, TensorStorageMetadata]:
    """What a checkpoint says of its tensors; it holds nothing else."""
    return {k: v for k, v in found.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}


def check(wanted: Mapping[str, Tensor], found: Metadata, checkpoint: Path) -> None:
    """Raises StateDictMismatch for a tensor that is missing or has another shape, UnreadableFile for one in part."""
    for name, value in wanted.items():
        have = tensor_metadata(found).get(name)
        if have is None or tuple(have.size) != tuple(value.shape):
            what = "has no" if have is None else f"has {tuple(have.size)} for"
            raise StateDictMismatch(
                f"the checkpoint {checkpoint} {what} {name}, which is {tuple(value.shape)} in the model",
                hint="give the model that it was made from",
            )
        elements: int = sum(torch.Size(chunk.sizes).numel() for chunk in have.chunks)
        if elements != value.numel():
            raise UnreadableFile(
                f"the checkpoint {checkpoint} holds {elements} of the {value.numel()} elements of {name}",
                hint="copy the folder again, all of it",
            )


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors takes no other; a rank's experts are contiguous already."""
    return {name: value if isinstance(value, DTensor) else value.contiguous() for name, value in state.items()}


def _refuse_non_finite(module: nn.Module, groups: Groups, step: int) -> None:
    finite = all(bool(torch.isfinite(p).all()) for p in module.parameters() if p.is_floating_point())
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    flags = torch.tensor([float(rank == groups.rank and not finite) for rank in groups.ranks], device=device)
    for group in (groups.experts, groups.data):
        if group is not None:
            flags = group.all_reduce(flags, _WHERE)
    bad = [str(rank) for rank, flag in zip(groups.ranks, flags.tolist()) if flag]
    if bad:
        raise NonFiniteWeights(
            f"the weights after step {step} hold NaN or infinity on rank {', '.join(bad)}; they were not saved",
            hint="go on from the checkpoint before, with a smaller learning rate",
        )


def _one_for_all(groups: Groups, topic: str, work: Any) -> None:
    """The first rank works, the others wait; its error is theirs."""
    leader, board = groups.ranks[0], groups.board
    note = f"checkpoint-{topic}-{board.turn(groups.rank)}"
    if groups.rank == leader:
        try:
            work()
        except MoeifyError as error:
            board.put(note, leader, error.what)
            raise
        board.put(note, leader, "")
        return
    answer = board.wait(note, [leader], groups.seconds)
    if leader not in answer:
        why = board.why_stopped(leader)
        raise RankLost(
            f"rank {leader} stopped: {why}" if why else f"rank {leader} did not write within {groups.seconds:g} s",
            where=_WHERE,
            hint=f"look at the log of rank {leader}",
        )
    if answer[leader]:
        raise OutputNotWritten(answer[leader], hint=f"see the error of rank {leader}")


@contextlib.contextmanager
def _translated(groups: Groups, what: str, kind: type[MoeifyError]) -> Iterator[None]:
    """CheckpointException, which ``except Exception`` would miss, as the cause of the first rank that failed."""
    try:
        with quiet():
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise kind(f"{what}: rank {rank}: {type(cause).__name__}: {str(cause).splitlines()[0]}") from error
    except RuntimeError as error:
        raise explain(error, groups.board, dist.get_rank(), groups.ranks, _WHERE, groups.seconds) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines of torch's own, whose cause is raised anyway."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
