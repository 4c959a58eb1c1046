"""What kernels use of a multiprocessor, by the report of ptxas, held against what there is.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_REGISTERS_PER_THREAD = 255
_REGISTERS_PER_BLOCK = 65536
# Stores and loads of one thread together. A few registers that are spilled once stay in the first cache; more of them
# mean that the tile is too large for the architecture.
_SPILLED = 64
_STATIC_SHARED = 48 * 1024
_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # of one block, with what is asked for at launch


@dataclass(frozen=True)
class Kernel:
    """``spilled`` are bytes of registers kept in memory by one thread; ``shared`` bytes of one block, without what is
    asked for at launch."""

    name: str
    registers: int
    shared: int
    spilled: int
    threads: int

    def problems(self) -> list[str]:
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
        if self.spilled > _SPILLED:
            found.append(f"{self.name} spills {self.spilled} bytes of registers, of {_SPILLED}")
        return found


def dynamic_limit(arch: str) -> int:
    """Bytes of shared memory that a launch on ``arch`` may ask for."""
    return _SHARED[arch]


def read_report(report: str, source: str) -> list[Kernel]:
    """The kernels of a ptxas report; their threads are in the source's launch bounds."""
    bounds = {name: int(n) for n, name in re.findall(r"__launch_bounds__\((\d+)\) (\w+)\(", source)}
    found = []
    for part in report.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        registers = _number(r"Used (\d+) registers", part)
        spilled = _number(r"(\d+) bytes spill stores", part) + _number(r"(\d+) bytes spill loads", part)
        found.append(Kernel(name, registers, _number(r"(\d+) bytes smem", part), spilled, bounds[name]))
    return found


def over_limits(kernels: Sequence[Kernel]) -> list[str]:
    """What is wrong with any of them."""
    return [problem for kernel in kernels for problem in kernel.problems()]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
