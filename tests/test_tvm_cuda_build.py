"""The CUDA target is compiled without a GPU: machine code in the library, tensor cores, and resources within limits."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tvm import relax, tirx

from moeify.backends.tvm.cuda import nvcc, pipeline
from moeify.backends.tvm.cuda.pipeline import Built
from moeify.backends.tvm.cuda.resources import Kernel, over_limits
from moeify.backends.tvm.cuda.table import table
from moeify.backends.tvm.families import Experts
from moeify.errors import Refused, RuntimeUnavailable
from tests.tvm_cuda import cuda_machine, module, needs_nvcc

SPEC = Experts("up", "gate", "down", "up_bias", None, "down_bias", "silu", 4, 64, 96, 64)


def layer(dtype: torch.dtype) -> tuple[Any, Any]:
    """A layer of a model: attention, norms, a router and its experts."""
    shapes = {"up": (4, 96, 64), "gate": (4, 96, 64), "down": (4, 64, 96), "up_bias": (4, 96), "down_bias": (4, 64)}
    shapes |= {"q": (64, 64), "router": (4, 64), "norm": (64,)}
    weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    s = tirx.Var("s", "int64")

    def emit(emitter: Any, x: Any) -> Any:
        families = table()
        wide = families("layer_norm", emitter, x, emitter.weights.plain("norm"), None, 1e-5)
        q = families("linear", emitter, wide, "q", None, "gelu")
        heads = emitter.emit(relax.op.permute_dims(emitter.emit(relax.op.reshape(q, (1, s, 4, 16))), [0, 2, 1, 3]))
        seen = families("attention", emitter, heads, heads, heads, None, True, 0.25)
        y = emitter.emit(relax.op.reshape(emitter.emit(relax.op.permute_dims(seen, [0, 2, 1, 3])), (s, 64)))
        logits = families("linear", emitter, y, "router", None)
        chosen = families("route", emitter, logits, 2)
        scale, experts = (emitter.emit(chosen[i]) for i in range(2))
        return families("dispatch_ffn", emitter, y, experts, scale, SPEC)

    return module({"x": ((s, 64), dtype)}, emit, weights)


@pytest.fixture(scope="module", params=[("float32", "sm_80"), ("float16", "sm_90")], ids="-".join)
def built(request: pytest.FixtureRequest) -> tuple[str, str, Built]:
    dtype, arch = request.param
    return dtype, arch, pipeline.build(layer(getattr(torch, dtype))[0], cuda_machine(arch))


@needs_nvcc
def test_the_library_has_machine_code_and_no_source(built: tuple[str, str, Built], tmp_path: Path) -> None:
    _, _, made = built
    library = tmp_path / "lib.so"
    made.executable.export_library(str(library))
    code = library.read_bytes()
    assert b"__syncthreads" not in code  # CUDA source would be compiled where it is loaded
    assert b"\x50\xed\x55\xba" in code  # a fat binary of CUDA begins so


@needs_nvcc
def test_every_kernel_is_reported_and_within_limits(built: tuple[str, str, Built]) -> None:
    _, arch, made = built
    names = set(re.findall(r"__launch_bounds__\(\d+\) (\w+)\(", made.source))
    assert {kernel.name for kernel in made.kernels} == names
    for family in ("moe_dispatch", "moe_up", "moe_down", "attention_scores", "linear", "matmul", "moe_topk"):
        assert any(name.startswith(family) for name in names), family
    assert over_limits(made.kernels, arch) == []
    assert all(kernel.registers > 0 for kernel in made.kernels)


@needs_nvcc
def test_float16_products_are_tensor_core_instructions(built: tuple[str, str, Built]) -> None:
    dtype, arch, made = built
    text = nvcc.ptx(made.source, arch)
    for kernel in made.kernels:
        # the second launch of a kernel sums up what experts gave
        if not re.match(r"(moe_up|moe_down|linear|matmul|attention)\w*_kernel$", kernel.name):
            continue
        body = re.search(rf"\.entry {kernel.name}\(.*?\n}}", text, re.S)
        assert body is not None
        instructions = re.findall(r"wmma\.mma\.sync[\w.]*", body.group(0))
        assert bool(instructions) == (dtype == "float16"), kernel.name
        # both operands, 64 and 128 rows of 32 with padding, and the sums of a block of 64 x 128
        assert (kernel.asked >= 2 * (64 + 128) * 32) == (dtype == "float16"), kernel.name
        assert all(i.endswith("f32.f32") for i in instructions), "sums are float32"


FITS = Kernel("k", 128, 49152, 0, 128)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"registers": 256}, "k has 256 registers a thread, of 255"),
        ({"registers": 130, "threads": 512}, "k has 69632 registers a block, of 65536"),
        ({"shared": 49153}, "k has 49153 bytes of shared memory, of 49152"),
        ({"asked": 180000}, "k asks for 229152 bytes of shared memory, of 166912"),
        ({"spilled": 72}, "k spills 72 bytes of registers, of 64"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, int], text: str) -> None:
    assert FITS.problems("sm_80") == []
    assert over_limits([FITS, dataclasses.replace(FITS, **change)], "sm_80") == [text]


@needs_nvcc
def test_a_kernel_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": torch.zeros(8, 8)}
    made, _ = module({"x": ((8, 8), torch.float32)}, lambda e, x: table()("linear", e, x, "w", None), weights)
    monkeypatch.setattr(
        pipeline, "over_limits", lambda kernels, arch: [f"{kernels[0].name} spills 4 bytes of registers"]
    )
    with pytest.raises(Refused, match=r"1 kernels do not fit sm_90: \w+ spills 4 bytes"):
        pipeline.compile(made, cuda_machine())


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable) as error:
        nvcc.find_nvcc()
    assert str(error.value) == (
        "the cuda target needs nvcc, and there is none\n"
        "  hint: install the CUDA toolkit (13.0) and put nvcc on PATH, or set CUDA_HOME to its folder"
    )


def test_cuda_home_goes_before_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find_nvcc() == tmp_path / "bin" / "nvcc"


@needs_nvcc
def test_source_that_does_not_compile() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"nvcc does not compile the kernels for fatbin: .*error"):
        nvcc.compile_cuda("this is no CUDA", "sm_90")
