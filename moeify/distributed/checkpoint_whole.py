"""A checkpoint as one file, and back: a safetensors file of the weights, or the single-process program."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from moeify.backends.writing import atomically
from moeify.distributed import checkpoint_folder as folders
from moeify.distributed import checkpoint_tensors as tensors
from moeify.distributed.checkpoint import check, read_metadata, read_tensors, tensor_metadata
from moeify.ir.program import Program


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
    read_tensors(into, reader, checkpoint)
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
    read_tensors(into, reader, checkpoint)
