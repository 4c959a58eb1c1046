"""Parameters in a safetensors file: written one at a time, read into memory that TVM's kernels may assume aligned.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header, then
the bytes of the tensors without gaps. Its own writer takes all tensors at once, which holds a model twice in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.errors import UnreadableFile

if TYPE_CHECKING:
    from moeify.backends.tvm.weights import Weight

# The types that are spoken of, and how the format spells them.
DTYPES = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "int8": "I8", "int16": "I16",
    "int32": "I32", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip


def write(file: Path, weights: Sequence[Weight]) -> None:
    """Raises OSError. At most one value is in memory at a time, beside what it is made from."""
    with file.open("r+b" if file.exists() else "wb") as out:  # what has been reserved for it is written over
        out.write(_head(weights))
        for weight in weights:
            out.write(_bytes(weight.value()))
        out.truncate()


def size(weights: Sequence[Weight]) -> int:
    """Bytes of the file."""
    return len(_head(weights)) + sum(_length(weight) for weight in weights)


def _head(weights: Sequence[Weight]) -> bytes:
    header, start = {}, 0
    for weight in weights:
        end = start + _length(weight)
        name = DTYPES[str(weight.dtype).removeprefix("torch.")]
        header[weight.name] = {"dtype": name, "shape": list(weight.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format wants: tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _length(weight: Weight) -> int:
    return math.prod(weight.shape) * weight.dtype.itemsize


def _bytes(value: Any) -> memoryview:
    import torch

    flat = value.reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).cpu().numpy())


def read(file: Path, names: Sequence[str], device: Any) -> list[Any]:
    """The tensors of these names on the device of TVM, in this order.

    Raises UnreadableFile for a missing or damaged file, or one that holds other tensors.
    """
    import numpy
    import safetensors

    from moeify.backends.tvm.arrays import aligned_copy

    try:
        with safetensors.safe_open(str(file), framework="numpy") as opened:
            if set(opened.keys()) != set(names):
                odd = sorted(set(opened.keys()) ^ set(names))[0]
                raise UnreadableFile(
                    f"the weights are of another library: {odd!r} is in only one of the two", where=str(file)
                )
            return [aligned_copy(numpy.asarray(opened.get_tensor(name)), device) for name in names]
    except (OSError, safetensors.SafetensorError) as error:
        raise UnreadableFile(f"cannot read the weights: {error}", where=str(file)) from error
