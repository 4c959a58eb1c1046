"""Files for ONNX Runtime's CUDA provider: exported where it is, run on it, and held against the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify.api.export import export_file
from moeify.backends.onnxruntime.backend import OnnxRuntime
from moeify.backends.onnxruntime.session import Session, cuda_is_usable
from tests.gpu import relative

pytestmark = pytest.mark.skipif(not cuda_is_usable(), reason="ONNX Runtime's CUDA provider cannot be used here")

WIDTH, HIDDEN = 128, 256  # what QMoE's kernels take


class Ffn(nn.Module):
    """A residual SwiGLU or ReLU block."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(x)) if self.gate is None else nn.functional.silu(self.gate(x)) * self.up(x)
        return x + self.down(hidden)


@pytest.fixture(scope="module", params=[False, True], ids=["relu", "swiglu"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, each split into four experts, all different."""
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    dense = nn.Sequential(Ffn(request.param), Ffn(request.param)).eval()
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    torch.export.save(
        torch.export.export(dense, (torch.randn(2, 3, WIDTH),), dynamic_shapes=sizes), folder / "dense.pt2"
    )
    recipe = moeify.Recipe(method="split-random", experts=4, top_k=2)
    moeify.convert_file(folder / "dense.pt2", folder / "moe.pt2", recipe)
    return folder / "moe.pt2"


# float32: sums in another order. Half: three roundings a block. 8 and 4 bits: half a step of 1/127 and 1/7 of the
# largest weight of a row, over the root mean square of a normal row (3 of it), in two products of two blocks.
CASES = [("float32", 0, 1e-5), ("float16", 0, 4e-3), ("bfloat16", 0, 3e-2), ("float16", 8, 2e-2), ("float16", 4, 0.25)]


@pytest.mark.parametrize(("dtype", "bits", "tolerance"), CASES)
def test_it_computes_what_the_program_does(moe: Path, tmp_path: Path, dtype: str, bits: int, tolerance: float) -> None:
    backend = OnnxRuntime(target="cuda", dtype=dtype, bits=bits)
    report = export_file(moe, tmp_path / "moe.onnx", backend, tolerance=tolerance)
    assert report.provider == "cuda"
    expected = "com.microsoft.QMoE" if bits else "com.microsoft.MoE"
    assert {block.lowering for block in report.blocks} <= {expected, "split"}
    session = Session(tmp_path / "moe.onnx", provider="cuda")
    program = moeify.load(moe)
    for rows in (1, 5, 300):
        x = torch.randn(1, rows, WIDTH).to(getattr(torch, dtype))
        (made,) = session.run([x])
        with torch.no_grad():
            right = program(x.float())
        assert made.shape == right.shape
        assert relative(made, right) < tolerance
