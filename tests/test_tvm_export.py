"""``export_file`` to TVM: what is compiled, verified and written, and refused with nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import fx, nn

import moeify
from moeify.api.export import export_file
from moeify.api.load import read_graph
from moeify.backends.tvm import backend as tvm_backend
from moeify.backends.tvm import load
from moeify.backends.tvm.backend import Tvm
from moeify.backends.tvm.lowering import ranges_json, source
from moeify.backends.tvm.machine import machine
from moeify.errors import BadOption, OutputNotWritten, Refused, RuntimeUnavailable, UsageError, VerificationFailed
from moeify.frontend import capture
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from tests.tvm_cuda import needs_nvcc

FILES = {"lib.so", "params.safetensors", "moeify.json"}
BAD = [
    ({"dtype": "float8"}, "there is no dtype 'float8'"),
    ({"expert_dtype": "int8"}, "there is no expert dtype 'int8'"),
    ({"dtype": "float16"}, "float16 needs the cuda target: on a CPU the kernels compute in float32"),
    ({"target": "cuda", "dtype": "bfloat16"}, "there is no dtype 'bfloat16'"),
    (
        {"target": "cuda", "expert_dtype": "float16"},
        "on the cuda target the experts have the type of the model",
    ),
    (
        {"target": "cuda", "lowering": "reference"},
        "the reference lowering is for CPUs: its kernels are plain loops",
    ),
    ({"tokens": 0}, "the expected number of tokens is 0: it must be positive"),
]
LATE = [
    ({"target": "tpu"}, "there is no target 'tpu'"),
    ({"target": "llvm -mcpu=z80"}, "LLVM knows no CPU 'z80' for x86_64-unknown-linux-gnu"),
    ({"target": "llvm -mcpu"}, "cannot read '-mcpu' of the target 'llvm -mcpu'"),
    ({"target": "llvm -mtriple=vax-dec-vms -mcpu=x"}, "moeify compiles for x86_64, aarch64, riscv64"),
    ({"target": "cuda"}, "the cuda target needs an architecture, and none was given"),
    ({"target": "cuda", "arch": "sm_20"}, "the cuda target needs an architecture, not 'sm_20'"),
    ({"arch": "sm_90"}, "--arch is for the cuda target, not for cpu"),
    ({"lowering": "split"}, "there is no lowering 'split'"),
]  # fmt: skip


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="relu", batch_first=True)
    return nn.Sequential(
        nn.Embedding(40, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 40)
    )


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    torch.save(encoder(), folder / "dense.pt")
    moeify.convert_file(folder / "dense.pt", folder / "moe.pt2", Recipe(experts=4, top_k=2, method="drop"))
    return folder / "moe.pt2"


@pytest.fixture(scope="module")
def exported(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tvm") / "out"
    return folder, export_file(moe, folder, Tvm())


def test_the_library_computes_what_the_program_computes(moe: Path, exported: tuple[Path, Any]):
    folder, report = exported
    assert report.verified
    assert (report.backend, report.provider) == ("tvm", "cpu")
    assert report.verified_on == "this machine's CPU"
    assert [block.lowering for block in report.blocks] == ["fused"] * 2
    assert all(block.relative_error is not None and block.relative_error < 1e-5 for block in report.blocks)
    ids = torch.randint(40, (3, 11))  # neither the batch nor the length of the example
    with torch.no_grad():
        expected = moeify.load(moe)(ids)
    torch.testing.assert_close(load(folder).run([ids])[0], expected, rtol=1e-4, atol=1e-5)


def test_what_is_written(moe: Path, exported: tuple[Path, Any]):
    folder, report = exported
    assert {file.name for file in folder.iterdir()} == FILES
    assert sorted(report.files) == sorted(str(folder / name) for name in FILES)
    assert report.bytes == sum(file.stat().st_size for file in folder.iterdir())
    header = json.loads((folder / "moeify.json").read_text())
    (name,) = (spec.name for spec in read_graph(moe)[0].inputs)
    assert header["inputs"] == [{"name": name, "dtype": "int64", "shape": ["batch", "seq"]}]
    assert header["outputs"] == [{"dtype": "float32", "shape": ["batch", "seq", 40]}]
    assert header["report"]["blocks"][0]["relative_error"] == report.blocks[0].relative_error
    assert header["report"]["recipe"]["experts"] == 4
    assert header["needs"]["apache-tvm"] == header["report"]["versions"]["apache-tvm"]


def test_the_default_output_is_beside_the_caller(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    report = export_file(moe, backend=Tvm(expert_dtype="bfloat16"))
    assert report.output == "moe-tvm"
    assert [file.name for file in tmp_path.iterdir()] == ["moe-tvm"]
    # bfloat16 has 8 bits: half a unit in the last place is 2e-3 of a weight, and sums of them stay near it.
    assert all(1e-5 < (block.relative_error or 0.0) < 2e-2 for block in report.blocks)
    assert "bfloat16 weights" in report.blocks[0].why


def test_a_library_for_another_cpu_is_checked_by_its_twin(moe: Path, tmp_path: Path):
    # Sapphire Rapids and Tremont have instructions that the other lacks, so no machine is both.
    other = next(cpu for cpu in ("sapphirerapids", "tremont") if not machine(f"llvm -mcpu={cpu}").native)
    report = export_file(moe, tmp_path / "out", Tvm(target=f"llvm -mcpu={other}"))
    assert report.verified_on.endswith("compiled for it from the same TIR (that CPU is not here)")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5


def test_a_block_that_fails_is_named_and_nothing_is_written(
    moe: Path, exported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(exported[0], tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    families = Tvm.families

    def wrong(self: Tvm, kind: str) -> Any:
        """Forgets the weights of the experts."""
        from tvm import relax

        right = families(self, kind)

        def dispatch(emitter: Any, x: Any, experts: Any, weights: Any, *rest: Any) -> Any:
            return right.table["dispatch_ffn"](emitter, x, experts, emitter.emit(relax.op.ones_like(weights)), *rest)

        return type(right)({**right.table, "dispatch_ffn": dispatch})

    monkeypatch.setattr(Tvm, "families", wrong)
    with pytest.raises(VerificationFailed) as failure:
        export_file(moe, tmp_path / "out", Tvm())
    assert failure.value.where == "1.layers.0"
    assert failure.value.what.startswith("the fused lowering fails verification: the relative error is ")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(("options", "what"), BAD)
def test_refuses_options(options: dict, what: str):
    with pytest.raises(BadOption) as error:
        Tvm(**options)
    assert error.value.what == what


@pytest.mark.parametrize(("options", "what"), LATE)
def test_refuses_before_any_work_what_only_tvm_knows(tmp_path: Path, options: dict, what: str):
    with pytest.raises(BadOption) as error:
        export_file(tmp_path / "none.pt2", tmp_path / "out", Tvm(**options))
    assert error.value.what.startswith(what)


def test_refuses_what_there_is_nothing_of(tmp_path: Path):
    with pytest.raises(BadOption, match="there is nothing to measure"):
        export_file(tmp_path / "none.pt2", tmp_path / "out", Tvm(), measure=True)
    with pytest.raises(UsageError, match="there is no fallback 'split'") as error:
        export_file(tmp_path / "none.pt2", tmp_path / "out", Tvm(), fallback="split")
    assert error.value.hint == "this backend has none"


def test_refuses_to_write_a_folder_over_a_file(moe: Path, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputNotWritten, match="it is a file, and TVM gets a folder"):
        export_file(moe, tmp_path / "out", Tvm())
    assert (tmp_path / "out").read_text() == "mine"


def test_a_program_of_several_processes_is_refused_with_the_reason():
    graph = fx.Graph()
    rows = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.moeify.all_to_all_even.default, (rows, "ep", 2)))
    program = Program(fx.GraphModule(nn.Module(), graph), (), ())
    with pytest.raises(Refused, match="does not take moe\\.all_to_all_even: TVM's all-to-all"):
        Tvm().check(program)


def test_the_users_data_is_verified_on(moe: Path, tmp_path: Path):
    name = read_graph(moe)[0].inputs[0].name
    numpy.savez(tmp_path / "batch.npz", **{name: numpy.random.default_rng(0).integers(0, 40, (5, 7))})
    report = export_file(moe, tmp_path / "out", Tvm(lowering="reference"), data=tmp_path / "batch.npz")
    assert report.tokens_verified == 2 * 5 * 7
    assert {block.lowering for block in report.blocks} == {"reference"}


def test_a_dimension_that_the_program_bounds_is_bounded_in_the_library(tmp_path: Path):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(12, 16))
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.table[: x.shape[1]]
            return x + self.down(torch.relu(self.up(x)))

    program = capture(Positions(), ["x=float32[batch=2,seq=5,16]"])
    assert ranges_json(source(program)) == {"seq": [0, 12]}


@needs_nvcc
def test_a_library_for_a_gpu_says_what_was_and_was_not_run(moe: Path, tmp_path: Path):
    report = export_file(moe, tmp_path / "out", Tvm(target="cuda", arch="sm_90", dtype="float16"))
    assert json.loads((tmp_path / "out" / "moeify.json").read_text())["target"] == "cuda sm_90"
    assert any("CUDA kernels compiled for sm_90: at most" in note for note in report.notes)
    if report.provider == "cpu":
        assert report.verified_on == "this machine's CPU, compiled for it from the same TIR (no GPU is here)"
    # A unit in the last place of float16 is 1e-3; a sum of 32 of them that loses more than one has an error.
    assert all(block.relative_error is not None and block.relative_error < 5e-3 for block in report.blocks)


def test_no_nvcc_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="the cuda target needs nvcc, and there is none"):
        export_file(tmp_path / "none.pt2", tmp_path / "out", Tvm(target="cuda", arch="sm_80"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_wrong_outside_its_blocks_is_refused(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = tvm_backend.TvmFolder.run
    monkeypatch.setattr(tvm_backend.TvmFolder, "run", lambda self, inputs: [1.01 * one for one in right(self, inputs)])
    with pytest.raises(VerificationFailed, match=r"every block is within 1e-04 .* and the whole model is off"):
        export_file(moe, tmp_path / "out", Tvm())
    assert list(tmp_path.iterdir()) == []
