"""``load(OUT).run(...)``: torch and numpy, what is shared and what is copied, and every refusal by its words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from moeify.backends.inputs import Taken
from moeify.backends.tvm import host, load, loader, packages
from moeify.backends.tvm.loader import Compiled
from moeify.errors import BadInputSpec, RuntimeUnavailable, UnknownName, UnreadableFile
from tests.tvm_libraries import expected, masked

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "out"
    masked().write(folder, {"model": "m.pt2"})
    return folder


@pytest.fixture(scope="module")
def compiled(out: Path) -> Compiled:
    return load(out)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 8), torch.rand(count) < 0.5


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_torch_in_torch_out(compiled: Compiled, count: int) -> None:
    inputs = rows(count)
    torch.testing.assert_close(compiled.run(inputs), expected(*inputs))


def test_numpy_in_numpy_out(compiled: Compiled) -> None:
    x, mask = rows(5)
    made = compiled.run({"mask": mask.numpy(), "x": x.numpy()})
    assert [type(value) for value in made] == [numpy.ndarray] * 2
    for have, want in zip(made, expected(x, mask)):
        torch.testing.assert_close(torch.from_numpy(have), want)


def test_one_tensor_makes_the_results_tensors(compiled: Compiled) -> None:
    x, mask = rows(2)
    assert isinstance(compiled.run([x.numpy(), mask])[0], torch.Tensor)


def test_memory_that_kernels_cannot_take_is_copied(compiled: Compiled) -> None:
    """Read-only, strided, at an odd place, with a gradient: all of it is right, and none of it is written to."""
    x, mask = rows(4)
    strided = torch.randn(8, 4).T
    odd = torch.randn(33)[1:].view(4, 8)
    wants_gradient = torch.randn(4, 8, requires_grad=True)
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    backwards = x.numpy()[::-1]
    for value in (strided, odd, wants_gradient, frozen, backwards):
        plain = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())
        made = compiled.run([value, mask])[0]
        torch.testing.assert_close(torch.as_tensor(made), expected(plain, mask)[0])


def test_aligned_memory_is_not_copied(compiled: Compiled) -> None:
    from moeify.backends.tvm.arrays import to_tvm

    x = torch.randn(64, 8)
    assert x.data_ptr() % 64 == 0
    assert to_tvm(x, compiled._device).data_ptr() == x.data_ptr()
    assert to_tvm(x.numpy(), compiled._device).data_ptr() == x.data_ptr()


def test_results_are_kept_while_it_runs_again(compiled: Compiled) -> None:
    first, second = rows(6), rows(6)
    kept = compiled.run(first)
    compiled.run(second)
    torch.testing.assert_close(kept, expected(*first))


def test_memory_of_sizes_that_do_not_come_again_is_given_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []
    clear = loader._clear_pool
    monkeypatch.setattr(loader, "_clear_pool", lambda: (cleared.append(1), clear()))
    compiled = load(out)
    kept = [(rows(count), count) for count in range(1, 40)]
    results = [(inputs, compiled.run(inputs)) for inputs, _ in kept]
    assert len(cleared) == 2  # after 16 sizes and after 32
    for inputs, made in results:
        torch.testing.assert_close(made, expected(*inputs))
    for _ in range(100):
        compiled.run(rows(39))
    assert len(cleared) == 2


def test_threads_of_the_caller_take_turns(compiled: Compiled) -> None:
    wrong = []

    def work() -> None:
        for count in (1, 7, 30):
            inputs = rows(count)
            made = compiled.run(inputs)
            if not torch.allclose(made[0], expected(*inputs)[0], rtol=1e-5, atol=1e-6):
                wrong.append(count)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_what_it_says_of_itself(compiled: Compiled) -> None:
    assert compiled.input_names == ["x", "mask"]
    assert compiled.report == {"model": "m.pt2"}
    assert str(compiled.header.outputs[0]) == "float32[rows, 4]"


_ALONE = """
import sys
sys.modules["torch"] = None  # importing it fails
sys.argv = ["/bin/moeify"]  # as the command does, which starts without torch
import numpy
from moeify.backends.tvm import load
compiled = load(sys.argv_out)
y, other = compiled.run([numpy.ones((2, 8), numpy.float32), numpy.array([True, False])])
import tvm
assert tvm.base._RUNTIME_ONLY
print(type(y).__name__, y.shape, other.tolist())
"""


def test_it_needs_neither_torch_nor_a_compiler(out: Path) -> None:
    script = _ALONE.replace("sys.argv_out", repr(str(out)))
    environment = {"TVM_USE_RUNTIME_LIB": "1", "PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ndarray (2, 4) [False, True]\n"


# --- inputs that do not fit ---------------------------------------------------------------------------------------

X, MASK = numpy.zeros((3, 8), numpy.float32), numpy.zeros(3, bool)
BAD: dict[str, tuple[Any, str]] = {
    "number": ([X], "the library takes 2 inputs and was given 1\n  hint: in this order: x, mask"),
    "missing": ({"x": X}, "the library needs the input 'mask'\n  hint: its inputs are x, mask"),
    "unknown": ({"x": X, "mask": MASK, "y": X}, "the library has no input 'y'\n  hint: its inputs are x, mask"),
    "kind": ([X.tolist(), MASK], "'x' must be a tensor or an array, not a list"),
    "dtype": ([X.astype(float), MASK], "'x' must be of float32, not of float64"),
    "rank": ([X[0], MASK], "'x' must have the shape [rows, 8], not [8]"),
    "size": ([X[:, 1:], MASK], "'x' must have the shape [rows, 8], not [3, 7]"),
    "names": ([X, MASK[:2]], "rows is 3 in 'x' and 2 in 'mask'"),
    "range": (
        [numpy.zeros((101, 8), numpy.float32), numpy.zeros(101, bool)],
        "rows is 101 in 'x': the library was compiled for 0 to 100",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_inputs(compiled: Compiled, case: str) -> None:
    inputs, text = BAD[case]
    with pytest.raises(BadInputSpec) as error:
        compiled.run(inputs)
    assert str(error.value) == text


def test_what_the_library_itself_refuses_is_told(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Taken, "named", lambda self, inputs: dict(zip("xm", inputs)))
    with pytest.raises(BadInputSpec) as error:
        compiled.run([X.astype(float), MASK])
    assert error.value.what == ("the library fails on these inputs: expect Tensor with dtype float32 but get float64")


# --- folders that do not load -------------------------------------------------------------------------------------


def changed(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / "moeify.json").read_text())
        (folder / "moeify.json").write_text(json.dumps({**data, **values}))

    return change


def damaged(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


def cut(folder: Path) -> None:
    file = folder / "params.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


_ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00"
BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no header": (damaged("moeify.json", None), UnreadableFile, "is not what moeify export writes: it has no moeify"),
    "no library": (damaged("lib.so", None), UnreadableFile, "is not what moeify export writes: it has no lib.so"),
    "no weights": (damaged("params.safetensors", None), UnreadableFile, "cannot read the weights: "),
    "header": (damaged("moeify.json", b"{"), UnreadableFile, "cannot read the description of the library: Expecting"),
    "deep header": (damaged("moeify.json", b"[" * 100_000), UnreadableFile, "cannot read the description"),
    "bytes": (damaged("moeify.json", b"\xff"), UnreadableFile, "cannot read the description of the library: 'utf-8'"),
    "library": (damaged("lib.so", b"x" * 100), UnreadableFile, "cannot load the library: .*invalid ELF header"),
    "empty library": (damaged("lib.so", b""), UnreadableFile, "cannot load the library: .*file too short"),
    "cut weights": (cut, UnreadableFile, "cannot read the weights: "),
    "other weights": (changed(weights=["a"]), UnreadableFile, "the weights are of another library: 'a' is in only one"),
    "format": (changed(format=2), UnreadableFile, "its format is 2 and this reads 1"),
    "other processor": (
        damaged("lib.so", _ELF + b"\xb7\x00" + bytes(44)),
        RuntimeUnavailable,
        "this library was compiled for aarch64 and this machine is x86_64",
    ),
    "older processor": (
        changed(cpu_flags=["avx1024"]),
        RuntimeUnavailable,
        "this library was compiled for a processor with avx1024, which this one does not have",
    ),
    "version": (
        changed(needs={"apache-tvm": "0.26.1"}),
        RuntimeUnavailable,
        "this library was compiled with apache-tvm 0.26.1 and 0.27",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_folders(out: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, kind, text = BROKEN[case]
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    shutil.copytree(out, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(kind, match=text):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("gpu", "text"),
    [
        (None, "this library runs on CUDA, and TVM finds no GPU here"),
        ("sm_86", "this library was compiled for sm_90 and this GPU is sm_86"),
    ],
)
def test_a_library_for_a_gpu_that_is_not_here(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str | None, text: str
) -> None:
    monkeypatch.setattr(host, "gpu_arch", lambda: gpu)
    shutil.copytree(out, tmp_path / "out")
    changed(device="cuda", target="cuda sm_90")(tmp_path / "out")
    with pytest.raises(RuntimeUnavailable) as error:
        load(tmp_path / "out")
    assert error.value.what == text


def test_a_gpu_runs_what_was_compiled_for_it_and_for_earlier_ones() -> None:
    """A library has PTX too, which later GPUs compile."""
    assert host.gpu_runs("sm_80", "sm_80")
    assert host.gpu_runs("sm_80", "sm_86")
    assert host.gpu_runs("sm_90", "sm_120")
    assert not host.gpu_runs("sm_90", "sm_86")
    assert not host.gpu_runs("sm_80", None)
    assert not host.gpu_runs("llvm", "sm_90")  # of a header that someone wrote


def test_refuses_what_is_no_folder_or_no_device(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="there is no folder "):
        load(tmp_path / "none")
    with pytest.raises(UnknownName, match="there is no device named 'cdua'"):
        load(out, "cdua")
    with pytest.raises(RuntimeUnavailable) as error:
        load(out, "cuda")
    assert error.value.what == "this library was compiled for cpu, not for cuda"
    assert error.value.hint == "export it again with --target cuda"


def test_another_version_of_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda _: "0.28.1")
    with pytest.raises(RuntimeUnavailable) as error:
        packages.require()
    assert str(error.value) == (
        "the tvm backend needs apache-tvm 0.27 and this is 0.28.1\n  hint: pip install 'moeify[tvm]'"
    )


def test_no_tvm(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    def none(_: str) -> str:
        raise packages.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(packages.importlib.metadata, "version", none)
    for ask in (packages.require, lambda: load(out)):
        with pytest.raises(RuntimeUnavailable) as error:
            ask()
        assert error.value.what == "the tvm backend needs the package apache-tvm, which is not installed"
