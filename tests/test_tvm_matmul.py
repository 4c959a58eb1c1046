"""Products of two computed tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeify.backends.tvm.cpu.matmul import matmul
from tests.tvm_dense import compiled, module, sizes


@pytest.mark.parametrize(
    ("left", "right", "a", "b"),
    [
        (("b", 3, "s", 9), ("b", 3, 9, "l"), (2, 3, 17, 9), (2, 3, 9, 21)),
        (("s", 7), (7, 16), (5, 7), (7, 16)),
        (("b", 3, "s", "l"), ("l", 40), (2, 3, 4, 5), (5, 40)),
        ((2, 1, "s", 5), (3, 5, 33), (2, 1, 4, 5), (3, 5, 33)),
        (("s", 7), (7, 16), (0, 7), (7, 16)),
    ],
)
def test_equals_torch(left: tuple, right: tuple, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    named = dict(zip("bsl", sizes("bsl"), strict=True))
    types = [(tuple(named.get(size, size) for size in shape), "float32") for shape in (left, right)]
    run = compiled(lambda e, x, y: matmul(e, x, y), types)
    x, y = torch.randn(a), torch.randn(b)
    torch.testing.assert_close(run(x, y), x @ y)


def test_what_is_declined() -> None:
    b, s = sizes("bs")
    seen: list[Any] = []

    def emit(e: Any, x: Any, y: Any) -> Any:
        seen.append(matmul(e, x, y))
        return x

    module(emit, [((s, 4), "float16"), ((4, 4), "float16")])
    module(emit, [((b, s, 4), "float32"), ((s, 4, 4), "float32")])
    module(emit, [((4,), "float32"), ((4, 4), "float32")])
    assert seen == [None, None, None]
