"""CUDA source, as TVM writes it, run on a CPU by a host compiler: see cuda_emulator.h."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import tirx

from moeify.backends.tvm.cuda import pipeline
from moeify.backends.tvm.cuda.nvcc import Compiled
from moeify.backends.tvm.cuda.tensor_cores import use_tensor_cores
from moeify.backends.tvm.cuda.tiles import WARP
from moeify.backends.tvm.machine import machine

_KERNEL = re.compile(r'^extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^;{]*)\) \{.*?^\}$', re.M | re.S)


def cuda_source(function: tirx.PrimFunc, monkeypatch: Any) -> str:
    """What TVM writes for a kernel."""
    monkeypatch.setattr(pipeline, "compile_cuda", lambda source, arch: Compiled(b"\0", ""))
    target = machine("cuda", "sm_80")
    with pipeline._nvcc(target.arch, []):
        module = tvm.compile(tvm.IRModule({"main": use_tensor_cores(function)}), target=target.target)
    return str(module.mod.imports[0].inspect_source("cuda"))


def emulate(source: str, folder: Path) -> Callable[..., None]:
    """The first kernel of the source as ``run(grid, backwards, arguments)``.

    Arguments are in the kernel's order, which is that of their first use: what is stored to goes before what is
    stored, and sizes go last.
    """
    found = _KERNEL.search(source)
    assert found is not None
    threads, name, parameters = int(found[1]), found[2], found[3]
    text = found[0].replace("extern __shared__ __align__(64) uchar buf_dyn_shmem_ptr[];", "")
    text = text.replace("__shared__ alignas(64)", "alignas(64) static")
    names = [part.split()[-1] for part in parameters.split(",")]
    launch = f"emulator::launch(gx, gy, {WARP}, {threads // WARP}, backwards, [=] {{ {name}({', '.join(names)}); }});"
    code = f'#include "cuda_emulator.h"\n{text}\n'
    code += f'extern "C" void run(int gx, int gy, int backwards, {parameters}) {{ {launch} }}\n'
    file, library = folder / "kernel.cc", folder / "kernel.so"
    file.write_text(code)
    here = Path(__file__).parent
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        "-w",
        f"-I{here}",
        str(file),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))

    def run(grid: tuple[int, int], backwards: bool, arguments: Sequence[Any]) -> None:
        assert len(arguments) == len(names), (names, len(arguments))
        loaded.run(*grid, int(backwards), *(_argument(value) for value in arguments))

    return run


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value)
