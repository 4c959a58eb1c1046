"""Linking for this machine and for others: found compilers, ELF headers, and what is said where there is none."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moeify.backends.tvm import host, linking, load
from moeify.backends.tvm.machine import machine
from moeify.errors import RuntimeUnavailable
from tests.tvm_libraries import masked

ARM = "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76"
_EXPORTED = 3  # ET_DYN: a shared library


def elf(file: Path) -> tuple[str | None, int]:
    """The architecture, and the type of the file."""
    return host.elf_machine(file), struct.unpack("<H", file.read_bytes()[16:18])[0]


def test_objects_are_of_the_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every object that goes to the linker: the kernels, and the data of the virtual machine."""
    made: list[str | None] = []

    def keep(_output: str, objects: Sequence[str], **_: Any) -> None:
        made.extend(host.elf_machine(Path(one)) for one in objects)

    monkeypatch.setattr(linking, "linker", lambda _: keep)  # one for that machine may not be here
    library = masked(machine(ARM))
    library.executable.export_library(str(tmp_path / "lib.so"), fcompile=keep)
    assert made
    assert set(made) == {"aarch64"}


def test_a_library_for_another_processor(tmp_path: Path) -> None:
    try:
        library = masked(machine(ARM))
    except RuntimeUnavailable:
        pytest.skip("no linker for aarch64 is here: pip install ziglang")
    library.write(tmp_path / "out")
    assert elf(tmp_path / "out" / "lib.so") == ("aarch64", _EXPORTED)
    assert "asimd" in library.header["cpu_flags"]
    if host.platform.machine() == "x86_64":
        with pytest.raises(RuntimeUnavailable, match="compiled for aarch64 and this machine is x86_64"):
            load(tmp_path / "out")


def test_a_library_for_this_processor(tmp_path: Path) -> None:
    masked().write(tmp_path / "out")
    assert elf(tmp_path / "out" / "lib.so") == (host.platform.machine(), _EXPORTED)


def test_a_newer_processor_of_the_same_kind_is_linked_here_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host.platform.machine() != "x86_64":
        pytest.skip("the test names an x86-64 processor")
    library = masked(machine("llvm -mcpu=sapphirerapids"))
    library.write(tmp_path / "out")
    monkeypatch.setattr(host, "_flags", lambda: {"avx", "avx2", "fma"})
    with pytest.raises(RuntimeUnavailable, match=r"a processor with .*avx512f.*, and this one has none of it"):
        load(tmp_path / "out")


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """No compiler is found but those in the dict that this gives."""
    found: dict[str, str] = {}
    monkeypatch.setattr(shutil, "which", found.get)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("tools", "command"),
    [
        (["clang", "cc"], ["/bin/clang", "-shared", "-fPIC"]),
        (["gcc", "g++"], ["/bin/g++", "-shared", "-fPIC"]),
        (["aarch64-linux-gnu-g++"], None),
    ],
)
def test_compilers_for_this_machine(nothing: dict[str, str], tools: list[str], command: list[str] | None) -> None:
    nothing.update({name: f"/bin/{name}" for name in tools})
    assert linking._native() == command


def test_the_users_compiler_comes_first(nothing: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    nothing["g++"] = "/bin/g++"
    monkeypatch.setenv("CXX", "ccache clang++")
    assert linking._native() == ["ccache", "clang++", "-shared", "-fPIC"]


@pytest.mark.parametrize(
    ("tools", "command"),
    [
        (["zig", "ld.lld", "aarch64-linux-gnu-gcc"], ["/bin/aarch64-linux-gnu-gcc", "-shared", "-fPIC"]),
        (["zig", "ld.lld"], ["/bin/ld.lld", "-shared"]),
        (["zig"], ["/bin/zig", "cc", "--target=aarch64-linux-gnu", "-nostdlib", "-shared", "-fPIC"]),
        (["g++"], None),
    ],
)
def test_linkers_for_another_machine(nothing: dict[str, str], tools: list[str], command: list[str] | None) -> None:
    nothing.update({name: f"/bin/{name}" for name in tools})
    assert linking._cross("aarch64-unknown-linux-gnu", "aarch64") == command


def test_no_linker_is_one_clear_error(nothing: dict[str, str]) -> None:
    with pytest.raises(RuntimeUnavailable) as error:
        linking.linker(machine(ARM))
    assert str(error.value) == (
        "linking a library for aarch64-linux-gnu needs a compiler, and none was found\n"
        "  hint: pip install ziglang, or apt-get install lld"
    )
    with pytest.raises(RuntimeUnavailable) as error:
        linking.linker(machine())
    assert error.value.hint == "apt-get install g++"


def test_what_the_linker_says_is_told(tmp_path: Path) -> None:
    link = linking.linker(machine())
    (tmp_path / "a.o").write_text("no object")
    with pytest.raises(OSError, match=r"fails: .*a\.o"):
        link(str(tmp_path / "a.so"), [str(tmp_path / "a.o")])
