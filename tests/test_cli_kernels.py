"""``moeify build-kernels`` and what ``moeify backends`` says of the library, without compiling anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeify.backends.onnxruntime import kernel_build
from moeify.cli.main import main
from moeify.errors import RuntimeUnavailable

BUILT = Path("/cache/libkernels.so")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The library once ``build`` has been called; nothing before."""
    there: list[Path] = []

    def build() -> Path:
        there[:] = [BUILT]
        return BUILT

    monkeypatch.setattr(kernel_build, "library", lambda: there[0] if there else None)
    monkeypatch.setattr(kernel_build, "build", build)
    monkeypatch.setattr(kernel_build, "isa", lambda: "avx2")
    monkeypatch.setattr(kernel_build, "compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(kernel_build, "reason", lambda: "the native kernels are not built")
    monkeypatch.setenv("COLUMNS", "120")
    return there


def test_it_says_what_it_made(made: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-kernels"]) == 0
    compiled, runs, library = capsys.readouterr().out.splitlines()
    assert compiled.startswith("compiled     by /usr/bin/g++ in 0.")
    assert runs == "runs here    with its avx2 kernels; it chooses by the CPU where it is loaded"
    assert library == f"library      {BUILT}"
    assert main(["build-kernels"]) == 0
    assert capsys.readouterr().out.startswith("compiled     before, from these sources")


def test_json(made: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(BUILT), "isa": "avx2"}


def test_the_path_alone_compiles_nothing(made: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-kernels", "--print-path"]) == 1
    assert capsys.readouterr() == (
        "",
        "error: the native kernels are not built\n  hint: 'moeify build-kernels' compiles them\n",
    )
    made.append(BUILT)
    assert main(["build-kernels", "--print-path"]) == 0
    assert capsys.readouterr().out == f"{BUILT}\n"


def test_without_a_compiler(
    made: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Path:
        raise RuntimeUnavailable("there is no C++ compiler", hint="install g++")

    monkeypatch.setattr(kernel_build, "build", build)
    assert main(["build-kernels", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["what"] == "there is no C++ compiler"


def test_backends_say_whether_it_is_there(made: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    assert capsys.readouterr().out.endswith("onnxruntime's kernel library: the native kernels are not built\n")
    assert main(["backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel_library"] is None
    made.append(BUILT)
    assert main(["backends"]) == 0
    assert capsys.readouterr().out.endswith(f"built for this machine (avx2): {BUILT}\n")
    assert main(["backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel_library"] == {"path": str(BUILT), "isa": "avx2"}
