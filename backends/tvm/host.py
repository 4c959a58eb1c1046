"""Whether the machine code of a library can run on this machine: asked before it is loaded, because a processor that
meets an instruction it does not have ends the process.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeify.errors import RuntimeUnavailable

# Features of LLVM that code generation uses, as Linux spells them.
_X86 = {
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2", "movbe": "movbe",
    "lzcnt": "abm", "popcnt": "popcnt", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "ssse3": "ssse3",
    "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16", "amx-int8": "amx_int8",
}  # fmt: skip
_ARM = {
    "neon": "asimd", "fullfp16": "asimdhp", "dotprod": "asimddp", "lse": "atomics", "sve": "sve", "sve2": "sve2",
    "bf16": "bf16", "i8mm": "i8mm",
}  # fmt: skip
_KINDS = {0x3E: "x86_64", 0xB7: "aarch64", 0xF3: "riscv64"}  # e_machine of an ELF file
_SPELLINGS = {"amd64": "x86_64", "arm64": "aarch64"}


def flags_of(target: Any) -> list[str]:
    """What the processor must have to run code for a tvm.target.Target (or the host of one), for moeify.json."""
    from tvm.target import codegen

    target = target.host or target
    triple = str(target.attrs.get("mtriple", "x86_64"))
    known = {"x86_64": _X86, "aarch64": _ARM}.get(triple.split("-")[0], {})
    features = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return sorted(flag for feature, flag in known.items() if feature in features)


def require_flags(flags: Sequence[str], where: str) -> None:
    """Raises RuntimeUnavailable naming what the processor lacks; says nothing where the system does not tell."""
    have = _flags()
    missing = [flag for flag in flags if flag not in have]
    if have and missing:
        raise RuntimeUnavailable(
            f"this library was compiled for a processor with {', '.join(missing)}, and this one has none of it"
            if len(missing) > 1
            else f"this library was compiled for a processor with {missing[0]}, which this one does not have",
            where=where,
            hint="export it with --target cpu on this machine, or 'llvm -mcpu=NAME' for one like it",
        )


def gpu_arch() -> str | None:
    """``sm_NN`` of the GPU of this machine, None without one."""
    import tvm

    device = tvm.cuda()
    return f"sm_{device.compute_version.replace('.', '')}" if device.exist else None


def gpu_runs(arch: str, have: str | None) -> bool:
    """Whether a GPU of ``have`` runs what nvcc compiled for ``arch``: its own machine code, or later the PTX."""
    wanted = re.fullmatch(r"sm_(\d+)", arch)
    return have is not None and wanted is not None and int(wanted[1]) <= int(have.removeprefix("sm_"))


def require_gpu(arch: str, where: str) -> None:
    """Raises RuntimeUnavailable without a GPU, or where it is older than ``arch`` (sm_NN)."""
    have = gpu_arch()
    if have is None:
        raise RuntimeUnavailable(
            "this library runs on CUDA, and TVM finds no GPU here", where=where, hint="export it with --target cpu"
        )
    if not gpu_runs(arch, have):
        raise RuntimeUnavailable(
            f"this library was compiled for {arch} and this GPU is {have}",
            where=where,
            hint="export it with --target cpu, or with an --arch that is no newer than this GPU",
        )


def require_kind(file: Path) -> None:
    """That an ELF file is for this kind of processor. Raises RuntimeUnavailable; OSError."""
    kind, here = elf_machine(file), _SPELLINGS.get(platform.machine().lower(), platform.machine().lower())
    if kind is not None and kind != here:
        raise RuntimeUnavailable(f"this library was compiled for {kind} and this machine is {here}", where=str(file))


def elf_machine(file: Path) -> str | None:
    """``x86_64``, ``aarch64``, ...; None for what is no little-endian ELF file. Raises OSError."""
    with file.open("rb") as opened:
        head = opened.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF" or head[5] != 1:
        return None
    number = int.from_bytes(head[18:20], "little")
    return _KINDS.get(number, f"machine {number:#x}")


def _flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return set(value.split())
    return set()
