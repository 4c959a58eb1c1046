"""CUDA source to machine code, offline, with the toolkit's nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moeify.errors import RuntimeUnavailable

_HINT = "install the CUDA toolkit (13.0) and put nvcc on PATH, or set CUDA_HOME to its folder"
# No --use_fast_math, which TVM's own call has: it rounds divisions and flushes small numbers.
_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas=-v", "-diag-suppress=177,550")
_HALF = tuple(
    f"-U__CUDA_NO_{kind}_{what}__"
    for kind in ("HALF", "BFLOAT16", "BFLOAT162")
    for what in ("OPERATORS", "CONVERSIONS")
)


@dataclass(frozen=True)
class Compiled:
    """``code`` is a fat binary with the machine code of one architecture and PTX for later ones; ``report`` what
    ptxas said of each kernel."""

    code: bytes
    report: str


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME or CUDA_PATH, else the one on PATH. Raises RuntimeUnavailable."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found is None:
        raise RuntimeUnavailable("the cuda target needs nvcc, and there is none", hint=_HINT)
    return Path(found)


def compile_cuda(source: str, arch: str) -> Compiled:
    """Machine code of CUDA source for ``arch`` (sm_NN). Raises RuntimeUnavailable when nvcc is absent or fails."""
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernels.fatbin"
        report = _run(
            source, folder, code, "--fatbin", f"-gencode=arch=compute_{number},code=[{arch},compute_{number}]"
        )
        return Compiled(code.read_bytes(), report)


def ptx(source: str, arch: str) -> str:
    """The source as PTX text. Raises as ``compile_cuda``."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernels.ptx"
        _run(source, folder, code, "--ptx", f"-arch={arch}")
        return code.read_text()


def _run(source: str, folder: str, out: Path, *flags: str) -> str:
    file = Path(folder) / "kernels.cu"
    file.write_text(source)
    command = [str(find_nvcc()), *flags, *_FLAGS, *_HALF, "-o", str(out), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line or "fatal" in line]
        first = said[0] if said else f"exit code {done.returncode}"
        raise RuntimeUnavailable(f"nvcc does not compile the kernels for {out.suffix[1:]}: {first}", hint=_HINT)
    return done.stdout + done.stderr
