"""Tensors of torch and arrays of numpy on their way into TVM and out, by DLPack. torch is not imported here: who
passes a tensor has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy
import tvm

_ALIGNED = 64  # bytes; what TVM compiles kernels for and refuses other memory


def is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_of(value: Any) -> str:
    """Of a tensor or an array, as TVM spells it."""
    return str(value.dtype).removeprefix("torch.")


def to_tvm(value: Any, device: Any) -> Any:
    """On the device; without a copy where the value is there, contiguous, writable and aligned to 64 bytes."""
    if is_torch(value):
        return _of_torch(value.detach(), device)
    array = numpy.asarray(value, order="C")
    shareable = device.dlpack_device_type() == tvm.cpu().dlpack_device_type() and array.flags.writeable
    if shareable and array.ctypes.data % _ALIGNED == 0 and dtype_of(array) != "bfloat16" and array.size:
        return tvm.runtime.from_dlpack(array)
    return aligned_copy(array, device)


def _of_torch(value: Any, device: Any) -> Any:
    value = value.contiguous()
    if value.device.type != ("cpu" if device.dlpack_device_type() == tvm.cpu().dlpack_device_type() else "cuda"):
        value = value.cpu()
        return aligned_copy(_numpy_of(value), device)
    if value.data_ptr() % _ALIGNED:
        value = value.clone()  # torch allocates at multiples of 64; a view may begin anywhere
    return tvm.runtime.from_dlpack(value)


def _numpy_of(value: Any) -> numpy.ndarray:
    if dtype_of(value) != "bfloat16":
        return value.numpy()
    import ml_dtypes

    return value.view(sys.modules["torch"].uint16).numpy().view(ml_dtypes.bfloat16)


def aligned_copy(array: numpy.ndarray, device: Any) -> Any:
    """A tensor of TVM's own."""
    array = numpy.asarray(array, order="C")
    made = tvm.runtime.empty(array.shape, dtype_of(array), device)
    if array.size:
        made.copyfrom(array)
    return made


def from_tvm(value: Any, like: Any) -> Any:
    """A result in the kind of ``like``: a torch tensor where that one is, else a numpy array.

    It shares memory with TVM's, but for a result on the GPU where ``like`` is not: that is copied to the CPU.
    """
    if value.device.dlpack_device_type() != tvm.cpu().dlpack_device_type():
        if is_torch(like) and like.device.type != "cpu":
            return sys.modules["torch"].from_dlpack(value)
        value = value.copyto(tvm.cpu())
    if is_torch(like):
        return sys.modules["torch"].from_dlpack(value)
    return value.numpy() if dtype_of(value) == "bfloat16" else numpy.from_dlpack(value)
