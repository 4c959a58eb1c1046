"""Layer norm, RMS norm and softmax against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tvm import relax

from moeify.backends.tvm.cpu.norms import layer_norm, rms_norm
from moeify.backends.tvm.cpu.softmax import softmax
from moeify.backends.tvm.machine import Tile
from tests.tvm_dense import TILES, compiled, module, sizes, this_machine

SHAPES = [(0, 3), (1, 1), (2, 7)]


@pytest.mark.parametrize(("width", "tile"), [(64, TILES[0]), (3, TILES[0]), *((37, tile) for tile in TILES)])
def test_layer_norm(width: int, tile: Tile) -> None:
    b, s = sizes("bs")
    types = [((b, s, width), "float32"), ((width,), "float32"), ((width,), "float32")]
    run = compiled(lambda e, x, w, bias: layer_norm(e, x, w, bias, 1e-5), types, on=this_machine(tile))
    weight, bias = torch.randn(width), torch.randn(width)
    for shape in SHAPES:
        x = torch.randn(*shape, width) * 3 + 5
        torch.testing.assert_close(run(x, weight, bias), F.layer_norm(x, (width,), weight, bias), rtol=2e-5, atol=2e-5)
        # wider than the default of 1.3e-6: |x - mean| cancels two digits, in torch as here


def test_layer_norm_without_weight_and_rms_norm() -> None:
    (t,) = sizes("t")
    x = torch.randn(5, 24)
    run = compiled(lambda e, x: layer_norm(e, x, None, None, 1e-12), [((t, 24), "float32")])
    torch.testing.assert_close(run(x), F.layer_norm(x, (24,), eps=1e-12))
    weight = torch.randn(24)
    run = compiled(lambda e, x, w: rms_norm(e, x, w, 1e-6), [((t, 24), "float32"), ((24,), "float32")])
    torch.testing.assert_close(run(x, weight), F.rms_norm(x, (24,), weight, 1e-6))


def test_a_sum_is_added_by_the_kernel() -> None:
    b, s = sizes("bs")
    types = [((b, s, 16), "float32")] * 2

    def emit(e, x, y):  # type: ignore[no-untyped-def]
        return layer_norm(e, e.emit(relax.op.add(x, y)), None, None, 1e-5)

    mod, _ = module(emit, types)
    assert "layer_norm_16_eps1em05_of_sum" in [v.name_hint for v in mod.get_global_vars()]
    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(compiled(emit, types)(x, y), F.layer_norm(x + y, (16,)))


@pytest.mark.parametrize("known", [True, False])
def test_softmax(known: bool) -> None:
    b, s = sizes("bs")
    for width in (1, 8, 37):
        run = compiled(lambda e, x: softmax(e, x), [((b, 2, width if known else s), "float32")])
        x = torch.randn(3, 2, width) * 20
        torch.testing.assert_close(run(x), x.softmax(-1))


def test_softmax_of_infinities_and_nan() -> None:
    (t,) = sizes("t")
    run = compiled(lambda e, x: softmax(e, x), [((t, 20), "float32")])
    x = torch.randn(4, 20)
    x[0, 3] = float("-inf")
    x[1, 3] = float("nan")
    x[2] = float("-inf")
    x[3, 5] = float("inf")
    torch.testing.assert_close(run(x), x.softmax(-1), equal_nan=True)
