"""A checkpoint as one file, and back: a safetensors file of the weights, or the single-process program."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

from moeify.backends.writing import atomically
from moeify.distributed import checkpoint_folder as folders
from moeify.distributed import checkpoint_tensors as tensors
from moeify.distributed.binding import binding_of
from moeify.distributed.checkpoint import check, quiet, read_metadata, tensor_metadata
from moeify.errors import StateDictMismatch, UnreadableFile
from moeify.ir.program import Program
from moeify.ir.sharding import share


def consolidate(checkpoint: str | Path, output: str | Path) -> None:
    """Write all weights of a checkpoint, whole, as one safetensors file with the model's names. One process calls it.

    Raises UnreadableFile or OutputNotWritten.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    folders.read_state(checkpoint)
    reader = HuggingFaceStorageReader(str(checkpoint))
    found = read_metadata(reader, checkpoint)
    into = {
        name: torch.empty(have.size, dtype=have.properties.dtype)
        for name, have in tensor_metadata(found).items()
        if name.startswith(tensors.MODEL)
    }
    _read(into, reader, checkpoint)
    with atomically(output) as temporary:
        save_file({name.removeprefix(tensors.MODEL): value for name, value in into.items()}, temporary)


def load_program(program: Program, checkpoint: str | Path) -> None:
    """The weights of a checkpoint in the whole program that the ranks were started from, in place.

    Raises UnreadableFile or StateDictMismatch.
    """
    checkpoint = Path(checkpoint)
    folders.read_state(checkpoint)
    reader = HuggingFaceStorageReader(str(checkpoint))
    into = {f"{tensors.MODEL}{name}": value for name, value in tensors.weights(program.graph_module).items()}
    check(into, read_metadata(reader, checkpoint), checkpoint)
    _read(into, reader, checkpoint)


def load_file(module: nn.Module, file: str | Path) -> None:
    """The weights of a whole safetensors file in a bound module: a rank reads its own experts and no others.

    Raises UnreadableFile or StateDictMismatch.
    """
    record = binding_of(module).sharding
    experts = {name: block.experts for block in record.blocks for name in block.parameters}
    try:
        with safe_open(file, framework="pt") as source, torch.no_grad():
            names = set(source.keys())
            for name, value in tensors.weights(module).items():
                if name not in names:
                    raise StateDictMismatch(f"{file} has no {name}", hint="give the weights of this model")
                part = source.get_slice(name)
                shape = (experts.get(name, value.shape[0]), *value.shape[1:]) if value.dim() else ()
                if tuple(part.get_shape()) != shape:
                    raise StateDictMismatch(f"{file} has {tuple(part.get_shape())} for {name}, which is {shape}")
                if name in experts:
                    start, stop = share(experts[name], record.ranks, record.rank)
                    value.copy_(part[start:stop])
                else:
                    value.copy_(source.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise UnreadableFile(f"cannot read {file}: {error}") from error


def _read(into: dict[str, Tensor], reader: HuggingFaceStorageReader, checkpoint: Path) -> None:
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
            dcp.load(into, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        _, (cause, _) = next(iter(error.failures.items()))
        raise UnreadableFile(f"cannot read the checkpoint {checkpoint}: {cause}") from error
