"""OUT/: there whole or not at all, and never in the place of something that is not ours."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify.backends.tvm import load, parameters
from moeify.backends.tvm.artefact import staged
from moeify.backends.tvm.header import BadHeader
from moeify.errors import OutputNotWritten
from tests.tvm_libraries import Library, expected, masked

FILES = ["lib.so", "moeify.json", "params.safetensors"]


@pytest.fixture(scope="module")
def library() -> Library:
    return masked()


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 8), torch.rand(count) < 0.5


def test_a_folder_is_written_and_holds_the_report(library: Library, tmp_path: Path) -> None:
    written = library.write(tmp_path / "out", {"verified": True})
    assert written == [tmp_path / "out" / name for name in FILES]
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    assert os.listdir(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "moeify.json").read_text()) == {
        **library.header,
        "report": {"verified": True},
    }


def test_it_runs_before_it_is_in_its_place(library: Library, tmp_path: Path) -> None:
    with staged(tmp_path / "out") as stage:
        stage.write(library.executable, library.weights, library.header, fcompile=library.link)
        inputs = rows()
        torch.testing.assert_close(load(stage.folder).run(inputs), expected(*inputs))
        torch.testing.assert_close(stage.twin(library.executable).run(inputs), expected(*inputs))
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == []  # finish was not called


def test_an_older_library_is_replaced_as_a_whole(library: Library, tmp_path: Path) -> None:
    library.write(tmp_path / "out", {"number": 1})
    library.write(tmp_path / "out", {"number": 2})
    assert load(tmp_path / "out").report == {"number": 2}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_failure_leaves_the_older_library(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    library.write(tmp_path / "out", {"number": 1})
    before = content(tmp_path)
    rename = os.rename

    def fails(source: Any, target: Any) -> None:
        if Path(source).name.endswith(".new"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(parameters, "write", full)
    else:
        monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OutputNotWritten) as error:
        library.write(tmp_path / "out", {"number": 2})
    assert str(error.value) == (
        f"cannot write {tmp_path / 'out'}: no space left on device\n"
        "  hint: nothing was changed; free space or choose another --output"
    )
    assert content(tmp_path) == before


def test_an_interrupt_leaves_nothing(library: Library, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as stage:
        stage.write(library.executable, library.weights, library.header, fcompile=interrupted)
    assert os.listdir(tmp_path) == []


_LIMITED = """
import sys
from pathlib import Path
from moeify.errors import OutputNotWritten
from tests.tvm_libraries import masked
library = masked()
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    library.write(Path(sys.argv[1]))
except OutputNotWritten as error:
    print(error.what)
"""


def test_a_full_disk_is_an_error_and_does_not_end_the_process(tmp_path: Path) -> None:
    """LLVM ends the process when it cannot write an object file: the room is asked for before."""

    def unlimited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "out")]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, preexec_fn=unlimited)
    assert done.stdout.splitlines() == [f"cannot write {tmp_path / 'out'}: file too large"]
    assert os.listdir(tmp_path) == []


def test_a_linker_that_fails_says_why(library: Library, tmp_path: Path) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise OSError("g++ fails: no space")

    with pytest.raises(OutputNotWritten, match="g\\+\\+ fails: no space"), staged(tmp_path / "out") as stage:
        stage.write(library.executable, library.weights, library.header, fcompile=link)
    assert os.listdir(tmp_path) == []


def test_a_header_that_could_not_be_read_is_not_written(library: Library, tmp_path: Path) -> None:
    with pytest.raises(BadHeader, match="its device is 'tpu'"), staged(tmp_path / "out") as stage:
        stage.write(library.executable, library.weights, {**library.header, "device": "tpu"})
    assert os.listdir(tmp_path) == []


def test_refuses_what_is_not_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    cases = {
        "out": f"cannot write {out}: it holds thesis.txt, which moeify did not write",
        "out/thesis.txt": f"cannot write {out / 'thesis.txt'}: it is a file, not a folder",
        "no/where": f"cannot write {tmp_path / 'no/where'}: the folder {tmp_path / 'no'} does not exist",
    }
    for name, what in cases.items():
        with pytest.raises(OutputNotWritten) as error, staged(tmp_path / name):
            pass
        assert error.value.what == what
    (out / "thesis.txt").rename(out / "lib.so")
    with (
        pytest.raises(OutputNotWritten, match=r"it has no moeify\.json: files which moeify did"),
        staged(out),
    ):
        pass
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(OutputNotWritten, match="it is a link, not a folder"), staged(tmp_path / "link"):
        pass
    assert content(tmp_path / "out") == {"lib.so": b"mine"}


def test_what_appears_meanwhile_is_not_replaced(library: Library, tmp_path: Path) -> None:
    with staged(tmp_path / "out") as stage:
        stage.write(library.executable, library.weights, library.header, fcompile=library.link)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(OutputNotWritten, match=r"it holds thesis\.txt"):
            stage.finish({})
    assert content(tmp_path) == {"out/thesis.txt": b"mine"}


def test_an_empty_folder_is_filled(library: Library, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    library.write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == FILES
