"""The output of a conversion: a write that fails or is interrupted, and a path that cannot be."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeify import Recipe
from moeify.api import convert_file
from moeify.errors import OutputNotWritten, UsageError
from tests.encoder_files import SPEC, dense_file

dense = pytest.fixture(scope="module")(dense_file)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(dense: Path, tmp_path: Path, monkeypatch, failure) -> None:
    output = tmp_path / "o.pt2"
    output.write_bytes(b"precious")

    def half(program, file, **kwargs) -> None:
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises((OutputNotWritten, KeyboardInterrupt)) as error:
        convert_file(dense, output, Recipe(experts=2), inputs=SPEC)
    if isinstance(failure, OSError):
        assert error.value.what == f"cannot write {output}: no space left on device"
    assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]


def test_a_real_file_size_limit(dense: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than 8 KiB, as a full disk would. torch alone would end the process."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from moeify import Recipe, convert_file\n"
        "from moeify.errors import OutputNotWritten\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try: convert_file(sys.argv[1], sys.argv[2], Recipe(experts=2), inputs=[sys.argv[3]])\n"
        "except OutputNotWritten as error: print(error.what)"
    )
    output = tmp_path / "o.pt2"
    done = subprocess.run(
        [sys.executable, "-c", code, str(dense), str(output), SPEC[0]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"cannot write {output}: file too large\n", done.stderr
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def handler():
    """Sets what SIGINT does, which a test run in the background inherits as nothing."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda wanted: signal.signal(signal.SIGINT, wanted)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("wanted", [signal.default_int_handler, signal.SIG_IGN])
def test_a_ctrl_c_while_writing(dense: Path, tmp_path: Path, monkeypatch, handler, wanted) -> None:
    output = tmp_path / "o.pt2"
    output.write_bytes(b"precious")
    save = torch.export.save
    handler(wanted)

    def interrupted(program, file, **kwargs) -> None:
        signal.raise_signal(signal.SIGINT)
        save(program, file, **kwargs)

    monkeypatch.setattr(torch.export, "save", interrupted)
    if wanted is signal.SIG_IGN:
        convert_file(dense, output, Recipe(experts=2), inputs=SPEC)
        assert output.read_bytes() != b"precious"
    else:
        with pytest.raises(KeyboardInterrupt):
            convert_file(dense, output, Recipe(experts=2), inputs=SPEC)
        assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]
    assert signal.getsignal(signal.SIGINT) is wanted


def test_outputs_that_cannot_be(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritten) as error:
        convert_file(dense, tmp_path / "no" / "o.pt2", Recipe(), inputs=SPEC)
    assert error.value.what == f"cannot write {tmp_path}/no/o.pt2: the folder {tmp_path}/no does not exist"
    folder = tmp_path / "f.pt2"
    folder.mkdir()
    for output in (folder, "/"):
        with pytest.raises(OutputNotWritten) as error:
            convert_file(dense, output, Recipe(), inputs=SPEC)
        assert error.value.what == f"cannot write {output}: it is a folder"
    model = tmp_path / "model.pt2"
    model.write_bytes(dense.read_bytes())
    with pytest.raises(UsageError) as error:
        convert_file(model, model, Recipe(), inputs=SPEC)
    assert error.value.what == f"the output {model} is the dense model itself"
    with pytest.raises(UsageError) as error:
        convert_file(dense, tmp_path / "o.onnx", Recipe(), inputs=SPEC)
    assert str(error.value) == f"the output {tmp_path}/o.onnx does not end in .pt2\n  hint: write {tmp_path}/o.pt2"
