"""The functions that vectorise, against float64, over all of float32: limits, infinities and NaN included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import tvm
from torch import Tensor
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu import activations, mathematics
from moeify.backends.tvm.machine import machine
from moeify.errors import UnknownName
from moeify.ir.activations import TABLE as ACTIVATIONS

_LANES = 16
# The errors that the module states: with fused multiply-add, and rounded twice without.
ERRORS = {"exp": 1e-7, "expm1": 1.3e-7, "log": 1e-7, "log1p": 1.3e-7, "tanh": 1.5e-7, "erf": 1e-7, "sigmoid": 1.5e-7}
UNFUSED = 1.8
DENORMAL = 1.2e-38  # below it a float32 has fewer digits
TARGETS = ["cpu", "llvm -mcpu=x86-64"]


def elementwise(functions: dict[str, Callable[[Any], Any]], target: str) -> Any:
    """A module with each function over [n, 16]."""
    made = {}
    for name, function in functions.items():
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(name)
            handles = [T.arg("x", T.handle()), T.arg("y", T.handle())]
            n = T.int64()
            x, y = (T.match_buffer(handle, (n, _LANES), "float32") for handle in handles)
            with T.parallel(0, n) as i, T.vectorized(0, _LANES) as j:
                T.buffer_store(y, function(x[i, j]), [i, j])
        made[name] = builder.get().with_attr("global_symbol", name).with_attr("tirx.noalias", True)
    return tvm.compile(tvm.IRModule(made), target=machine(target).target)


def apply(module: Any, name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    module[name](tvm.runtime.from_dlpack(x.view(-1, _LANES)), tvm.runtime.from_dlpack(y.view(-1, _LANES)))
    return y


def numbers() -> Tensor:
    """Every exponent, the ranges where the functions bend, and the values that are no number."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=draw).to(torch.int32).view(torch.float32)
    wide = torch.rand(1 << 17, generator=draw) * 220 - 110
    near = torch.rand(1 << 17, generator=draw) * 10 - 5
    inf = float("inf")
    special = torch.tensor(
        [0.0, -0.0, inf, -inf, float("nan"), 1.0, -1.0, 1e-45, 88.72283, 88.72284, -87.4, -104.1] * 4
    )
    return torch.cat((bits, wide, near, special))


@pytest.fixture(scope="module", params=TARGETS)
def functions(request: pytest.FixtureRequest) -> tuple[Any, float]:
    if request.param != "cpu" and "x86_64" not in str(machine().target.attrs["mtriple"]):
        pytest.skip("not an x86-64 machine")
    fused = 1.0 if request.param == "cpu" else UNFUSED
    return elementwise({name: getattr(mathematics, name) for name in ERRORS}, request.param), fused


@pytest.mark.parametrize("name", ERRORS)
def test_error(functions: tuple[Any, float], name: str) -> None:
    module, fused = functions
    x = numbers().abs() if name == "log1p" else numbers()
    y, want = apply(module, name, x), getattr(torch, name)(x.double())
    rounded = want.float()
    assert torch.equal(y.isnan(), rounded.isnan())
    assert torch.equal(y.isinf(), rounded.isinf())
    assert torch.equal(y[y.isinf()], rounded[y.isinf()])
    normal = want.isfinite() & rounded.isfinite() & (want.abs() > DENORMAL)
    assert float(((y - want).abs() / want.abs())[normal].max()) < ERRORS[name] * fused
    # 1 / (1 + e^-x) is 0 where e^-x is infinite.
    least = DENORMAL if name == "sigmoid" else 3e-45
    tiny = ~normal & rounded.isfinite()
    assert not tiny.any() or float((y - want).abs()[tiny].max()) <= least


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_called_for_each_element(target: str) -> None:
    if target != "cpu" and "x86_64" not in str(machine().target.attrs["mtriple"]):
        pytest.skip("not an x86-64 machine")
    module = elementwise({name: getattr(mathematics, name) for name in ERRORS}, target)
    assembly = module.mod.inspect_source("asm") if hasattr(module, "mod") else module.inspect_source("asm")
    for name in (*ERRORS, "expf", "logf", "tanhf", "erff"):
        assert f"{name}@" not in assembly


@pytest.fixture(scope="module")
def named() -> Any:
    return elementwise({name: activations.lookup(name) for name in ACTIVATIONS}, "cpu")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(named: Any, name: str) -> None:
    """As far from float64 as torch's own float32 is, and the same where the result is infinite or NaN."""
    x = numbers()
    y, torchs, want = apply(named, name, x), ACTIVATIONS[name](x), ACTIVATIONS[name](x.double())
    for kind in (torch.isnan, lambda v: v.isinf() & x.isinf()):
        # Either way where torch does not agree with itself: its float32 GELU of infinity is NaN with AVX-512.
        assert ((kind(y) == kind(torchs)) | (kind(y) == kind(want))).all()
    held = want.float().isfinite() & (want.abs() < 1e37)
    scale = want.abs().maximum(x.abs().double()).clamp(min=DENORMAL)
    mine, theirs = (((v - want).abs() / scale)[held].max() for v in (y, torchs))
    assert float(mine) < max(3e-7, 1.5 * float(theirs))


def test_all_activations_have_an_expression() -> None:
    assert set(activations.TABLE) == set(ACTIVATIONS)
    with pytest.raises(UnknownName, match="there is no activation named 'gleu'"):
        activations.lookup("gleu")


def test_a_polynomial_is_horners() -> None:
    text = str(mathematics.polynomial(tirx.Var("x", "float32"), (3.0, 2.0, 1.0)))
    assert text.count("*") == 2
