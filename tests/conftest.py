"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden instead of comparing with it")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state and leaves the cores to its neighbours."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_kernel_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports choose as on a machine without the library of native kernels, whether or not there is one here."""
    if "kernel_library" not in request.fixturenames:
        monkeypatch.setattr("moeify.backends.onnxruntime.kernel_library.is_built", lambda: False)


@pytest.fixture(scope="session")
def kernel_library() -> Path:
    """The library of native kernels, compiled if it is not there."""
    from moeify.backends.onnxruntime import kernel_build

    if kernel_build.library() is None and kernel_build.compiler() is None:
        pytest.skip(kernel_build.reason())
    return kernel_build.build()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with tests/golden/{name}.txt, or rewrite it under --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path.name} does not exist: run pytest --update-golden and read it"
        assert text == path.read_text()

    return compare
