"""TVM's CUDA runtime in a process without a CUDA driver, for compiling only.

Machine code is put into a library by the module class of TVM's CUDA runtime. That runtime is linked with the driver's
library, which only machines with a GPU have; without it TVM would write CUDA source into the library, to be compiled
where it is loaded. A library of the same name whose functions do nothing but fail takes the driver's place.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import tvm
import tvm_ffi

from moeify.backends.tvm.cuda.nvcc import find_nvcc
from moeify.errors import RuntimeUnavailable

_NEEDS = "cuDeviceGetName cuFuncSetAttribute cuGetErrorName cuGetErrorString cuLaunchKernelEx cuModuleGetFunction"
_NEEDS += " cuModuleLoadData cuModuleUnload cuTensorMapEncodeTiled"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def load_runtime() -> None:
    """Make ``ffi.Module.create.cuda`` known. Raises RuntimeUnavailable."""
    if _known():
        return
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        with tempfile.TemporaryDirectory() as folder:  # what is loaded stays when its file is gone
            ctypes.CDLL(str(_stub(Path(folder))), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeUnavailable(
            f"TVM's CUDA runtime does not load: {error}", hint="it needs libcudart.so.13 of the CUDA toolkit 13"
        ) from None
    if not _known():
        raise RuntimeUnavailable(f"{library.name} has no CUDA modules", hint="install apache-tvm 0.27.0.post1")


def _known() -> bool:
    return tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None


def _stub(folder: Path) -> Path:
    """The library that stands for the driver."""
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("\n".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}" for name in _NEEDS.split()))
    command = [str(find_nvcc()), "--shared", "-Xcompiler=-fPIC", "-Xlinker=-soname,libcuda.so.1", "--cudart=none"]
    done = subprocess.run([*command, "-o", str(library), str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeUnavailable(
            f"nvcc cannot link a library: {(done.stderr or done.stdout).strip().splitlines()[-1]}",
            hint="nvcc needs a C++ compiler of the host, such as g++",
        )
    return library
