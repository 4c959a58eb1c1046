"""Every named activation of the CUDA target, against torch."""

from __future__ import annotations

import pytest
import torch
import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as B

from moeify.backends.tvm.cuda.activations import TABLE
from moeify.backends.tvm.cuda.building import argument, each, function
from moeify.backends.tvm.cuda.serial import serial
from moeify.backends.tvm.machine import machine
from moeify.ir import activations


def test_the_table_is_complete() -> None:
    assert TABLE.keys() == activations.TABLE.keys()


@pytest.fixture(scope="module")
def computed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([0.0, 1e-6, -1e-6, 1e-20, 88.0, -88.0, 100.0, -100.0])])
    x = torch.cat([x, torch.tensor([float("inf"), float("nan")])])
    functions = {}
    for name, activation in TABLE.items():
        with function() as builder:
            u, y = argument("u", x.shape, "float32"), argument("y", x.shape, "float32")
            with each(tirx.const(len(x), "int64")) as i:
                B.buffer_store(y, activation(u[i]), [i])
        functions[name] = serial(builder.get()).with_attr("global_symbol", name)
    library = tvm.compile(tvm.IRModule(functions), target=machine("cpu").target)
    found = {}
    for name in TABLE:
        y = tvm.runtime.tensor(torch.zeros_like(x).numpy())
        library[name](tvm.runtime.tensor(x.numpy()), y)
        found[name] = torch.from_numpy(y.numpy())
    return x, found


@pytest.mark.parametrize("name", TABLE)
def test_it_is_torchs(name: str, computed: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    x, found = computed
    finite = x.isfinite()
    want = activations.lookup(name)(x[finite].double())
    error = (found[name][finite].double() - want).abs() / want.abs().clamp_min(1)
    # 1 + erf and 1 + tanh cancel where they are near -1, so the error is relative to 1 and not to the value.
    assert error.max() < 1e-6
    assert torch.equal(found[name].isnan()[-1:], torch.tensor([True]))


def test_infinity_is_kept_where_torch_keeps_it(computed: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    x, found = computed
    for name, values in found.items():
        want = activations.lookup(name)(x[-2:-1])
        torch.testing.assert_close(values[-2:-1], want, rtol=0, atol=0, equal_nan=True, msg=name)
