"""The CUDA source of the matrix kernels, run on the CPU thread by thread: barriers, shared memory and tensor cores.

Threads run forwards and backwards; both must give the result of the operator.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moeify.backends.tvm.cuda.grouped import Grouped, make_grouped
from moeify.backends.tvm.cuda.matmul import Dense, make_dense
from moeify.backends.tvm.cuda.tiles import ceildiv, tile_for
from tests.cuda_emulator import cuda_source, emulate
from tests.tvm_cuda import relative

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++, which the source is compiled with, is not here"
)

# float32: sums in another order; float16: one rounding of the result.
BOUND = {"float32": 2e-6, "float16": 2**-11}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "columns"])
def test_a_dense_product(dtype: str, by_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, k = 70, 136, 72
    spec = Dense(None, n, k, dtype, dtype, by_rows=by_rows, share=0, bias=True, activation="relu")
    run = emulate(cuda_source(make_dense(spec), monkeypatch), tmp_path)
    tile, kind = tile_for(dtype), getattr(torch, dtype)
    a, b, bias = torch.randn(1, m, k).to(kind), torch.randn(1, n, k).to(kind), torch.randn(n).to(kind)
    want = F.relu(F.linear(a.float(), b[0].float(), bias.float()))
    blocks = ceildiv(m, tile.rows)
    held = b if by_rows else b.transpose(1, 2).contiguous()
    for backwards in (False, True):
        y = torch.full((1, m, n), float("nan"), dtype=kind)
        run((blocks, ceildiv(n, tile.columns)), backwards, [a, held, y, bias, 1, blocks, m])
        assert relative(y, want) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
def test_experts_with_gate_gathered_rows_and_idle_tiles(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Grouped(3, 40, 72, dtype, gather=2, gated=True, bias=True, activation="relu2")
    run = emulate(cuda_source(make_grouped(spec), monkeypatch), tmp_path)
    tile, kind, tokens = tile_for(dtype), getattr(torch, dtype), 35
    x, up, gate = (torch.randn(shape).to(kind) for shape in ((tokens, 40), (3, 72, 40), (3, 72, 40)))
    bias, order = torch.randn(3, 72).to(kind), torch.randperm(2 * tokens, dtype=torch.int32)
    tiles = torch.tensor([[1, 0, 66], [1, 64, 66], [2, 66, 70], [0, 0, 0]], dtype=torch.int32)
    expert = torch.tensor([1] * 66 + [2] * 4)
    rows = x.float()[order.long() // 2]
    sides = [torch.einsum("rd,rfd->rf", rows, weight.float()[expert]) for weight in (gate, up)]
    want = F.relu(sides[0]).square() * (sides[1] + bias.float()[expert])
    for backwards in (False, True):
        y = torch.full((2 * tokens, 72), float("nan"), dtype=kind)
        run((4, ceildiv(144, tile.columns)), backwards, [tiles, x, order, gate, up, y, bias, 4])
        assert relative(y, want) < BOUND[dtype]


def test_a_missing_barrier_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above would fail without one: a test of the emulator."""
    spec = Dense(None, 64, 64, "float32", "float32", share=0)
    source = cuda_source(make_dense(spec), monkeypatch)
    barrier = "__syncthreads();"
    barriers = source.count(barrier)
    assert barriers == 2
    a, b = torch.randn(1, 64, 64), torch.randn(1, 64, 64)
    for missing in range(barriers):
        parts = source.split(barrier)
        text = barrier.join(parts[: missing + 1]) + barrier.join(parts[missing + 1 :])
        folder = tmp_path / str(missing)
        folder.mkdir()
        run = emulate(text, folder)
        wrong = []
        for backwards in (False, True):
            y = torch.zeros(1, 64, 64)
            run((1, 1), backwards, [a, b, y, 1, 1, 64])
            wrong.append(relative(y, a @ b.transpose(1, 2)) > BOUND["float32"])
        assert any(wrong), missing
