"""The machine that is compiled for: TVM's target, and the register tile that the matrix kernels are made for."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import Any

from moeify.errors import BadOption

CUDA_ARCHS = ("sm_80", "sm_90")
_ARCHITECTURES = ("x86_64", "aarch64", "riscv64")


@dataclass(frozen=True)
class Tile:
    """What one inner loop of a matrix kernel holds in registers: ``rows`` x ``columns`` float32 sums.

    ``columns`` is a whole number of vectors, and the width of the panels that weights are packed in.
    """

    rows: int
    columns: int


# rows * columns / lanes sums, columns / lanes weights and one or two broadcast values must fit the registers.
_AVX512 = Tile(12, 32)  # 24 + 2 + 1 of 32 registers of 16
_AVX2 = Tile(6, 16)  # 12 + 2 + 1 of 16 registers of 8
_NEON = Tile(8, 8)  # 16 + 2 + 2 of 32 registers of 4
_PLAIN = Tile(4, 8)  # 8 + 2 + 1 of 16 registers of 4 (SSE)


@dataclass(frozen=True)
class Machine:
    """``kind`` is "cpu" or "cuda"; ``target`` a tvm.target.Target with its host; ``arch`` sm_NN on CUDA."""

    kind: str
    target: Any
    tile: Tile
    arch: str = ""
    native: bool = True  # what is compiled for it runs on the CPU of this machine

    @property
    def text(self) -> str:
        """As a person would write it."""
        if self.kind == "cuda":
            return f"cuda {self.arch}"
        attributes = self.target.attrs
        more = f" -mattr={','.join(map(str, attributes['mattr']))}" if "mattr" in attributes else ""
        return f"llvm -mtriple={attributes['mtriple']} -mcpu={attributes['mcpu']}{more}"


def machine(target: str = "cpu", arch: str = "") -> Machine:
    """``cpu`` (this machine), ``cuda`` with an ``arch``, or ``llvm -mcpu=... [-mtriple=...] [-mattr=...]``.

    Raises BadOption.
    """
    words = shlex.split(target)
    if target == "cuda":
        return _cuda(arch)
    if arch:
        raise BadOption(f"--arch is for the cuda target, not for {target}")
    if target == "cpu":
        return _cpu({})
    if words and words[0] == "llvm":
        return _cpu(_options(words[1:], target))
    raise BadOption(
        f"there is no target {target!r}", hint="choose cpu, cuda, or 'llvm -mcpu=NAME [-mtriple=TRIPLE] [-mattr=+A,+B]'"
    )


def _options(words: list[str], target: str) -> dict[str, str]:
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in ("-mcpu", "-mtriple", "-mattr") or not equals or not value:
            raise BadOption(f"cannot read {word!r} of the target {target!r}", hint="'llvm -mcpu=skylake-avx512'")
        options[key[1:]] = value
    return options


def _cpu(options: dict[str, str]) -> Machine:
    from tvm.target import Target, codegen

    host_triple, host_cpu = codegen.llvm_get_system_triple(), codegen.llvm_get_system_cpu()
    # LLVM was built by conda, whose vendor name is no part of what the machine is.
    triple = options.get("mtriple", host_triple.replace("-conda-", "-unknown-"))
    same_cpu = triple.split("-")[0] == host_triple.split("-")[0]
    if "mcpu" not in options and not same_cpu:
        raise BadOption(f"the target {triple} needs a CPU: this machine has another one", hint="add -mcpu=NAME")
    cpu = options.get("mcpu", host_cpu)
    if triple.split("-")[0] not in _ARCHITECTURES:  # LLVM ends the process on a triple that it does not know
        raise BadOption(
            f"moeify compiles for {', '.join(_ARCHITECTURES)}, not for the triple {triple!r}",
            hint="-mtriple=aarch64-linux-gnu, for example",
        )
    config: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": cpu}
    if "mattr" in options:
        config["mattr"] = options["mattr"].split(",")
    known = codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": triple}))
    if cpu not in [str(name) for name in known]:
        raise BadOption(f"LLVM knows no CPU {cpu!r} for {triple}", hint="llc -mcpu=help lists the names")
    config["num-cores"] = os.cpu_count() or 1
    found = Target(config)
    native = same_cpu and _runs_here(found, Target({"kind": "llvm", "mtriple": host_triple, "mcpu": host_cpu}))
    return Machine("cpu", found, _tile(found), native=native)


def _tile(target: Any) -> Tile:
    from tvm.target.codegen import llvm_cpu_has_features

    def has(feature: str) -> bool:
        return bool(llvm_cpu_has_features(feature, target))

    if target.attrs["mtriple"].startswith("aarch64"):
        return _NEON
    if has("avx512f"):
        return _AVX512
    return _AVX2 if has("avx2") and has("fma") else _PLAIN


def _runs_here(target: Any, host: Any) -> bool:
    """Whether the host has every feature that the target's CPU has."""
    from tvm.target.codegen import llvm_get_cpu_features

    return {str(f) for f in llvm_get_cpu_features(target)} <= {str(f) for f in llvm_get_cpu_features(host)}


def _cuda(arch: str) -> Machine:
    from tvm.target import Target

    if arch not in CUDA_ARCHS:
        said = f"not {arch!r}" if arch else "and none was given"
        raise BadOption(f"the cuda target needs an architecture, {said}", hint=f"--arch {' or '.join(CUDA_ARCHS)}")
    host = _cpu({})
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
    target = Target({"kind": "cuda", "arch": arch, **limits}, host=host.target)
    return Machine("cuda", target, host.tile, arch=arch, native=False)
