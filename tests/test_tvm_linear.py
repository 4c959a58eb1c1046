"""Linear layers: every width and number of rows, biases, activations, and what is declined."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeify.backends.tvm.cpu.linear import linear
from moeify.backends.tvm.machine import Tile
from tests.tvm_dense import TILES, compiled, module, sizes, this_machine

ROWS = (0, 1, 2, 5, 6, 7, 12, 13, 31)


def weights(outputs: int, depth: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"w": torch.randn(outputs, depth), "b": torch.randn(outputs)}


@pytest.mark.parametrize(
    ("outputs", "depth", "tile"),
    [(64, 24, TILES[0]), (3, 7, TILES[0]), (1, 1, TILES[0]), *((50, 33, t) for t in TILES)],
)
def test_equals_torch_for_any_width_and_number_of_rows(outputs: int, depth: int, tile: Tile) -> None:
    values = weights(outputs, depth)
    (t,) = sizes("t")
    run = compiled(lambda e, x: linear(e, x, "w", "b"), [((t, depth), "float32")], values, this_machine(tile))
    for rows in ROWS:
        x = torch.randn(rows, depth)
        torch.testing.assert_close(run(x), F.linear(x, values["w"], values["b"]))


def test_leading_axes_are_kept_and_a_bias_may_be_absent() -> None:
    values = weights(20, 8)
    b, s = sizes("bs")
    run = compiled(lambda e, x: linear(e, x, "w", None), [((b, s, 8), "float32")], values)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(run(x), F.linear(x, values["w"]))


def test_an_activation_is_fused() -> None:
    values = weights(20, 8)
    (t,) = sizes("t")
    run = compiled(lambda e, x: linear(e, x, "w", "b", "gelu"), [((t, 8), "float32")], values)
    x = torch.randn(9, 8)
    torch.testing.assert_close(run(x), F.gelu(F.linear(x, values["w"], values["b"])))


def test_equal_layers_share_a_kernel_and_the_name_tells_them_apart_from_others() -> None:
    values = {"w": torch.randn(16, 16), "v": torch.randn(16, 16), "b": torch.randn(16)}
    (t,) = sizes("t")

    def three(e, x):  # type: ignore[no-untyped-def]
        return linear(e, linear(e, linear(e, x, "w", "b"), "v", "b"), "w", "b", "relu")

    mod, made = module(three, [((t, 16), "float32")], values)
    names = sorted(v.name_hint for v in mod.get_global_vars())
    assert names == ["linear_16x16_identity_bias", "linear_16x16_relu_bias", "main"]
    assert [weight.name.split(":")[0] for weight in made] == ["w", "b", "v"]


def test_half_precision_is_declined() -> None:
    values = {"w": torch.randn(4, 4).half()}
    (t,) = sizes("t")
    seen = []
    module(lambda e, x: seen.append(linear(e, x, "w", None)) or x, [((t, 4), "float16")], values)
    assert seen == [None]


def test_sums_stay_in_registers_whatever_else_is_in_the_module() -> None:
    """One function without its promise of no aliasing made LLVM keep every sum of the module in memory."""
    import tvm
    from tvm import relax

    from moeify.backends.tvm.cpu import pipeline

    values = weights(64, 24)
    b, s = sizes("bs")
    mod, _ = module(lambda e, x: e.emit(relax.op.tanh(linear(e, x, "w", "b"))), [((b, s, 24), "float32")], values)
    library = pipeline.compile(mod, this_machine(Tile(6, 16))).mod.imports[0]
    assert isinstance(library, tvm.runtime.Module)
    text = library.inspect_source("ll")
    loads = text.count("load <16 x float>")
    products = text.count("llvm.fmuladd.v16f32(")
    assert products >= 21  # one for each row of each of the tiles of 6, 5, 4, 3, 2 and 1 rows
    assert loads < products, "each product would load its sum"
    assert "TVMBackendAllocWorkspace(" not in text
