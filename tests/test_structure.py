"""The shape of the repository is tested too."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moeify.backends import BACKENDS
from moeify.experts import METHODS
from moeify.nn.routers import ROUTERS
from moeify.pipeline import PASSES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [p for folder in ("moeify", "passes", "backends") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_packages_of_pyproject_are_those_on_disk() -> None:
    mapped = {"passes": "moeify.passes", "backends": "moeify.backends"}
    found = set()
    for init in [p for p in SOURCES if p.name == "__init__.py"]:
        folder = init.parent.relative_to(ROOT).as_posix()
        for prefix, package in mapped.items():
            if folder == prefix or folder.startswith(prefix + "/"):
                folder = package + folder[len(prefix) :]
                break
        found.add(folder.replace("/", "."))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_the_mapped_folders_do_not_exist_inside_the_package() -> None:
    assert not (ROOT / "moeify" / "passes").exists()
    assert not (ROOT / "moeify" / "backends").exists()


@pytest.mark.parametrize("registry", [PASSES, METHODS, ROUTERS], ids=lambda r: r.kind)
def test_names_match_files_and_docstrings_exist(registry) -> None:
    for name, target in registry.table.items():
        assert target.partition(":")[0].rpartition(".")[2] == name.replace("-", "_")
        assert registry.cls(name).__doc__, name


def test_every_pass_has_a_test_file_and_shows_before_and_after() -> None:
    for name in PASSES:
        assert (ROOT / "tests" / f"test_{name.replace('-', '_')}.py").exists(), name
        doc = PASSES.cls(name).__doc__
        assert "Before" in doc, name
        assert "After" in doc, name


def test_every_pass_file_is_registered() -> None:
    files = {p.stem.replace("_", "-") for p in (ROOT / "passes").glob("*.py")} - {"--init--"}
    assert files == set(PASSES)


def test_backends_state_what_they_take() -> None:
    for name in BACKENDS:
        assert BACKENDS.cls(name).LOWER


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_ascii_and_hold_one_idea(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    assert len(text.splitlines()) <= 320
    assert path.name not in ("utils.py", "helpers.py", "common.py", "core.py", "manager.py")


def test_importing_moeify_costs_torch_and_nothing_heavier() -> None:
    heavy = "transformers networkx rich typer scipy onnx onnxruntime tvm safetensors numpy.testing"
    code = f"import sys, moeify; print([m for m in {heavy.split()!r} if m in sys.modules and m not in before])"
    code = f"import sys, torch; before = set(sys.modules); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    import moeify

    assert moeify.__all__ == [
        "__version__", "convert", "load", "observe", "losses", "after_step", "routing", "profile", "quality", "tune",
        "train", "inspect_file", "convert_file", "train_file", "verify_files", "export_file", "Profile", "Recipe",
        "Report", "MoeifyError",
    ]  # fmt: skip
    for name in moeify.__all__:
        assert getattr(moeify, name) is not None


def test_version_is_the_packages() -> None:
    import moeify

    assert moeify.__version__ == PROJECT["project"]["version"]


def test_make_alone_prints_the_commands_of_the_readme_and_ci_runs_one() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line.split()[0] for line in shown.splitlines()]
    assert {"setup", "demo", "test", "bench", "samples"} <= set(commands)
    assert "make test " in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().endswith("\nmake test\n")
