"""samples/tvm_cpp: a compiled program in a process without Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tvm_libraries import expected, masked

SAMPLE = Path(__file__).parent.parent / "samples" / "tvm_cpp"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("make") is None, reason="g++ and make build the C++ example"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    flags = "CXXFLAGS=-O0 -Wall -Wextra -Werror"
    command = ["make", "-C", str(SAMPLE), f"PYTHON={sys.executable}", f"BUILD={folder}", flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "out"
    masked().write(folder)
    return folder


def start(*command: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env={})


@pytest.mark.parametrize("count", [0, 1, 33])
def test_it_computes_what_python_computes(run: Path, out: Path, tmp_path: Path, count: int) -> None:
    x, mask = torch.randn(count, 8), torch.rand(count) < 0.5
    save_file({"mask": mask, "x": x}, tmp_path / "in")
    done = start(run, out, tmp_path / "in", tmp_path / "result")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote 2 results to {tmp_path / 'result'}\n"
    made = load_file(tmp_path / "result")
    torch.testing.assert_close([made["0"], made["1"]], expected(x, mask))


def test_it_is_linked_to_no_python(run: Path) -> None:
    printed = subprocess.run(["ldd", str(run)], capture_output=True, text=True, check=True).stdout
    linked = {line.split()[0].partition(".so")[0] for line in printed.splitlines()}
    assert {"libtvm_runtime", "libtvm_ffi"} <= linked
    assert not [name for name in linked if "python" in name or "torch" in name or "compiler" in name]


def test_what_it_refuses(run: Path, out: Path, tmp_path: Path) -> None:
    assert start(run).returncode == 2
    x, mask = torch.randn(3, 8), torch.ones(3, dtype=torch.bool)
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": ({"x": x}, "the input mask is missing"),
        "type": ({"x": x.double(), "mask": mask}, "the input x has another type than the program takes"),
        "shape": ({"x": x, "mask": mask[:2]}, "shape[0] mismatch"),
        "range": (
            {"x": torch.randn(101, 8), "mask": torch.ones(101, dtype=torch.bool)},
            "rows is 101 in x: the program was compiled for 0 to 100",
        ),
    }
    for name, (inputs, text) in cases.items():
        save_file(inputs, tmp_path / name)
        done = start(run, out, tmp_path / name, tmp_path / "result")
        assert done.returncode == 1
        assert text in done.stderr
    (tmp_path / "cut").write_bytes((tmp_path / "shape").read_bytes()[:-1])
    for file, text in ((tmp_path / "cut", "lies outside"), (out / "lib.so", "is no safetensors file")):
        done = start(run, out, file, tmp_path / "result")
        assert (done.returncode, text in done.stderr) == (1, True)
    assert not (tmp_path / "result").exists()


def test_another_processor(run: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "other")
    header = json.loads((out / "moeify.json").read_text())
    header["cpu_flags"] = ["sse9"]
    (tmp_path / "other" / "moeify.json").write_text(json.dumps(header))
    done = start(run, tmp_path / "other", tmp_path / "in", tmp_path / "result")
    assert (done.returncode, done.stderr) == (1, "error: the program was compiled for a processor with sse9\n")
