"""Saving a bound module on W ranks and loading it on any other number of them.

The files are safetensors, written and read by ``torch.distributed.checkpoint``: they hold nothing that could run, and
every rank touches only what it holds.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

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
from moeify.distributed.agreement import agreed
from moeify.distributed.binding import binding_of
from moeify.distributed.board import Board
from moeify.distributed.checkpoint_folder import State
from moeify.distributed.groups import Groups
from moeify.distributed.lost import answering, explain
from moeify.errors import NonFiniteWeights, OutputNotWritten, StateDictMismatch, UnreadableFile

_WHERE = "checkpoint"
FILE_BYTES = 1 << 28
_MADE: WeakKeyDictionary[Board, dist.ProcessGroup] = WeakKeyDictionary()  # by the board of the groups


def save(
    module: nn.Module,
    mesh: DeviceMesh | None,
    folder: str | Path,
    step: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    facts: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``folder/step-0000STEP``. Every rank calls it; the path, when it is there for all. A run of one process
    needs no mesh.

    ``facts`` are plain data for the one who loads. The last ``keep`` checkpoints stay. Raises, the same on every rank,
    NonFiniteWeights before anything is written, OutputNotWritten or RankLost; the checkpoints before are untouched
    then.
    """
    folder = Path(folder)
    groups = binding_of(module).groups
    first = groups.rank == groups.ranks[0]

    def begin() -> dict[str, Tensor]:
        state = tensors.state_of(module, mesh, optimizer)
        _refuse_non_finite(module, step)
        if first:
            folders.begin(folder, step)
        return _contiguous(state)

    def finish() -> None:
        if first:
            folders.finish(folder, State(step, groups.size, dict(facts or {})), keep)

    state = agreed(groups, _WHERE, begin)
    with _translated(groups, f"cannot write a checkpoint to {folder}"):
        part = str(folders.part_of(folder, step))
        writer = HuggingFaceStorageWriter(part, file_of(state, FILE_BYTES), save_distributed=True)
        if groups.size == 1:
            with _meant():
                dcp.save(state, storage_writer=writer, no_dist=True)
        else:
            dcp.save(state, storage_writer=writer, process_group=_group(groups))
    agreed(groups, _WHERE, finish)
    return folders.path_of(folder, step)


def load(
    module: nn.Module,
    mesh: DeviceMesh | None,
    checkpoint: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> State:
    """Read one checkpoint, of any number of ranks, into the module and the optimizer. Every rank calls it.

    Raises, the same on every rank, UnreadableFile, StateDictMismatch for a checkpoint of another model, RanksDiffer
    for ranks that have read different steps, or RankLost; some tensors may have been read then.
    """
    checkpoint = Path(checkpoint)

    def read() -> State:
        state = folders.read_state(checkpoint)
        reader = HuggingFaceStorageReader(str(checkpoint))
        found = read_metadata(reader, checkpoint)
        if optimizer is not None:
            tensors.prepare(module, optimizer, set(found.state_dict_metadata))
        wanted = tensors.state_of(module, mesh, optimizer)
        check(wanted, found, checkpoint)
        read_tensors(wanted, reader, checkpoint)
        return state

    return agreed(binding_of(module).groups, _WHERE, read, alike=lambda state: f"step {state.step}")


def file_of(state: Mapping[str, Tensor], limit: int) -> dict[str, int]:
    """The number of the file, from 1, that a rank writes each tensor to: as many as fit ``limit`` bytes, at least one.

    The writer makes a copy of a file in memory, and every rank has one at a time.
    """
    files: dict[str, int] = {}
    number, held = 1, 0
    for name, value in state.items():
        size = (value.to_local() if isinstance(value, DTensor) else value).nbytes
        if held and held + size > limit:
            number, held = number + 1, 0
        files[name] = number
        held += size
    return files


def read_tensors(into: dict[str, Tensor], reader: HuggingFaceStorageReader, checkpoint: Path) -> None:
    """Fill the tensors with what this process needs of the files, the other ranks unasked. Raises UnreadableFile."""
    try:
        with quiet(), _meant():
            dcp.load(into, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        _, (cause, _) = next(iter(error.failures.items()))
        raise UnreadableFile(
            f"cannot read the checkpoint {checkpoint}: {type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error


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


def _refuse_non_finite(module: nn.Module, step: int) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in module.parameters() if p.is_floating_point()):
        raise NonFiniteWeights(
            f"the weights after step {step} hold NaN or infinity; they were not saved",
            hint="go on from the checkpoint before, with a smaller learning rate",
        )


def _group(groups: Groups) -> dist.ProcessGroup:
    """The ranks of the mesh, which need not be all there are, with the timeout of their exchanges.

    On gloo: what goes round are Python objects. Made once: torch names a group by its ranks, and a second one of the
    same name would meet the addresses of the first.
    """
    made = _MADE.get(groups.board)
    if made is None:
        limit = timedelta(seconds=groups.seconds)
        made = dist.new_group(sorted(groups.ranks), limit, backend="gloo", use_local_synchronization=True)
        _MADE[groups.board] = made
    return made


@contextlib.contextmanager
def _translated(groups: Groups, what: str) -> Iterator[None]:
    """CheckpointException, which ``except Exception`` would miss, as the cause of the first rank that failed."""
    try:
        with quiet(), answering(groups.board, groups.rank, _WHERE):
            yield
    except CheckpointException as error:
        number, (cause, _) = next(iter(error.failures.items()))
        rank = sorted(groups.ranks)[number]
        raise OutputNotWritten(f"{what}: rank {rank}: {type(cause).__name__}: {str(cause).splitlines()[0]}") from error
    except RuntimeError as error:
        raise explain(error, groups.board, groups.rank, groups.ranks, _WHERE, groups.seconds) from error


@contextlib.contextmanager
def _meant() -> Iterator[None]:
    """Without torch's warning that one process is asked alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


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
