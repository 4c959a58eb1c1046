"""What kernels use of a multiprocessor, by the report of ptxas, held against what there is.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from moeify.backends.tvm.cuda.statements import rewrite

_REGISTERS_PER_THREAD = 255
_REGISTERS_PER_BLOCK = 65536
# Stores and loads of one thread together. A few registers that are spilled once stay in the first cache; more of them
# mean that the tile is too large for the architecture.
_SPILLED = 64
_STATIC_SHARED = 48 * 1024
_BYTES = {"float32": 4, "float16": 2}
_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # of one block, with what is asked for at launch


@dataclass(frozen=True)
class Kernel:
    """``spilled`` are bytes of registers kept in memory by one thread; ``shared`` bytes of one block that the code
    has, and ``asked`` those that a launch asks for besides.
    """

    name: str
    registers: int
    shared: int
    spilled: int
    threads: int
    asked: int = 0

    def problems(self, arch: str) -> list[str]:
        """Why it cannot run, or runs badly."""
        found = []
        if self.registers > _REGISTERS_PER_THREAD:
            found.append(f"{self.name} has {self.registers} registers a thread, of {_REGISTERS_PER_THREAD}")
        # Registers are given to warps in steps of 8 a thread.
        block = -(-self.registers // 8) * 8 * self.threads
        if block > _REGISTERS_PER_BLOCK:
            found.append(f"{self.name} has {block} registers a block, of {_REGISTERS_PER_BLOCK}")
        if self.shared > _STATIC_SHARED:
            found.append(f"{self.name} has {self.shared} bytes of shared memory, of {_STATIC_SHARED}")
        if self.shared + self.asked > _SHARED[arch]:
            found.append(f"{self.name} asks for {self.shared + self.asked} bytes of shared memory, of {_SHARED[arch]}")
        if self.spilled > _SPILLED:
            found.append(f"{self.name} spills {self.spilled} bytes of registers, of {_SPILLED}")
        return found


def asked_for(mod: tvm.IRModule) -> dict[str, int]:
    """Bytes of shared memory that the launches of our kernels ask for, by the name of the function: all its buffers,
    some of which TVM may put into one place.
    """
    found: dict[str, int] = {}
    for variable, function in mod.functions.items():
        if not isinstance(function, tirx.PrimFunc) or not function.attrs.get("tirx.is_scheduled", False):
            continue
        sizes: list[int] = []

        def look(node: Any, sizes: list[int] = sizes) -> Any:
            for buffer in getattr(node, "alloc_buffers", ()):
                if buffer.scope() == "shared.dyn":
                    sizes.append(math.prod(int(n) for n in buffer.shape) * _BYTES[str(buffer.dtype)])
            return node

        rewrite(function.body, look)
        found[variable.name_hint] = sum(sizes)
    return found


def read_report(report: str, source: str, asked: Mapping[str, int]) -> list[Kernel]:
    """The kernels of a ptxas report; their threads are in the source's launch bounds. ``asked`` is by function, whose
    kernels are ``{function}_kernel``, ``{function}_kernel_1``, ...
    """
    bounds = {name: int(n) for n, name in re.findall(r"__launch_bounds__\((\d+)\) (\w+)\(", source)}
    found = []
    for part in report.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        registers = _number(r"Used (\d+) registers", part)
        spilled = _number(r"(\d+) bytes spill stores", part) + _number(r"(\d+) bytes spill loads", part)
        shared, function = _number(r"(\d+) bytes smem", part), re.sub(r"_kernel(_\d+)?$", "", name)
        found.append(Kernel(name, registers, shared, spilled, bounds[name], asked.get(function, 0)))
    return found


def over_limits(kernels: Sequence[Kernel], arch: str) -> list[str]:
    """What is wrong with any of them on ``arch``."""
    return [problem for kernel in kernels for problem in kernel.problems(arch)]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
