"""Tensors of torch and arrays of numpy on their way into the runtime and out. torch is not imported here: who passes
a tensor has imported it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import onnxruntime

BFLOAT16 = 16  # TensorProto.BFLOAT16, which numpy has no type for
_ELEMENTS = {  # the runtime's spelling of element types -> TensorProto.DataType
    "float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "double": 11, "uint32": 12, "uint64": 13, "bfloat16": BFLOAT16,
}  # fmt: skip
_SPELLINGS = {"float32": "float", "float64": "double"}  # numpy's and torch's -> the runtime's


def is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def element(value: Any) -> str:
    """The element type of a tensor or array as the runtime spells it: "float", "float16", "int64"."""
    name = str(value.dtype).removeprefix("torch.")
    return _SPELLINGS.get(name, name)


def element_number(spelling: str) -> int:
    """The TensorProto.DataType of ``tensor(float)``."""
    return _ELEMENTS[spelling.removeprefix("tensor(").removesuffix(")")]


@dataclass(frozen=True)
class Buffer:
    """Memory of a tensor or array, which ``owner`` keeps alive."""

    owner: Any
    pointer: int
    shape: tuple[int, ...]
    element: str
    device: str  # "cpu" or "cuda"
    index: int

    @classmethod
    def of(cls, value: Any, *, writable: bool = False) -> Buffer:
        """Of the value itself where it is contiguous, else of a copy. ``writable`` memory is never a copy."""
        if is_torch(value):
            value = value.detach()
            held = value if writable and value.is_contiguous() else _no_copy(value.contiguous(), writable, value)
            device = value.device
            return cls(held, held.data_ptr(), tuple(held.shape), element(held), device.type, device.index or 0)
        held = _no_copy(numpy.ascontiguousarray(value).reshape(numpy.shape(value)), writable, value)
        return cls(held, held.ctypes.data, held.shape, element(held), "cpu", 0)


def _no_copy(held: Any, writable: bool, value: Any) -> Any:
    pointer = (lambda a: a.data_ptr()) if is_torch(held) else (lambda a: a.ctypes.data)
    if writable and pointer(held) != pointer(value):
        raise ValueError("is not contiguous, so the runtime cannot write into it")
    return held


def value_of(array: Any) -> onnxruntime.OrtValue:
    """On the CPU, without a copy for contiguous memory."""
    if is_torch(array):
        array = array.detach().cpu().contiguous()
        is_bfloat16 = element(array) == "bfloat16"
        array = (array.view(sys.modules["torch"].uint16) if is_bfloat16 else array).numpy()
    else:
        array = numpy.ascontiguousarray(array).reshape(numpy.shape(array))
        is_bfloat16 = element(array) == "bfloat16"
        array = array.view(numpy.uint16) if is_bfloat16 else array
    if is_bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def to_arrays(values: Sequence[onnxruntime.OrtValue], as_torch: bool) -> list[Any]:
    """Tensors, or arrays (bfloat16 as that of ml_dtypes), in order."""
    return [_to_torch(value) if as_torch else _to_numpy(value) for value in values]


def _to_torch(value: onnxruntime.OrtValue) -> Any:
    torch = sys.modules["torch"]
    if value.data_type() == "tensor(bfloat16)" or value.device_name() != "cpu":
        return torch.from_dlpack(value._ortvalue.to_dlpack())
    return torch.from_numpy(value.numpy())


def _to_numpy(value: onnxruntime.OrtValue) -> numpy.ndarray:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    import ml_dtypes

    shape = tuple(value.shape())
    count = int(numpy.prod(shape, dtype=numpy.int64))
    if not count:
        return numpy.empty(shape, dtype=ml_dtypes.bfloat16)
    raw = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return numpy.ctypeslib.as_array(raw).copy().view(ml_dtypes.bfloat16).reshape(shape)
