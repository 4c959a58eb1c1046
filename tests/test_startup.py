"""What starting costs. bench/bench_startup.py has the times; here is what is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["transformers", "networkx", "onnx", "onnxruntime", "tvm", "rich", "typer", "scipy"]


def loaded(code: str, *names: str) -> list[str]:
    """Which of the modules are there after the code ran in a fresh Python."""
    script = f"import sys\n{code}\nprint([n for n in {list(names)!r} if n in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return eval(done.stderr.splitlines()[-1])


def test_import_moeify_loads_torch_and_nothing_heavier() -> None:
    assert loaded("import moeify", "torch", *HEAVY) == ["torch"]


def test_import_moeify_registers_the_operators() -> None:
    assert loaded("import moeify, torch; torch.ops.moeify.ffn.default", "moeify.ir.ops") == ["moeify.ir.ops"]


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_command_starts_without_torch(flag: str) -> None:
    code = f"sys.argv = ['/usr/bin/moeify', '{flag}']\nfrom moeify.cli.main import main\nmain(['{flag}'])"
    assert loaded(code, "torch", "numpy", "networkx", "rich.console", "typer") == ["typer"]


def test_python_dash_m_starts_without_torch_too() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "moeify", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "moeify 0.1.0\n"
    assert "torch" not in done.stderr


@pytest.mark.parametrize("command", ["passes", "methods", "routers", "backends"])
def test_listings_need_nothing_that_another_command_imported(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "moeify", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_loader_of_compiled_libraries_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from moeify.backends.tvm import load; print(load.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "load\n", done.stderr
