"""The parameters of a compiled program: each in the layout that its kernel reads, kept apart from the code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """One parameter of the compiled function. ``make`` computes its value, which has that shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    var: Any  # relax.Var
    make: Make

    def value(self) -> torch.Tensor:
        """The value, contiguous; checked, because a wrong shape would be read as memory out of bounds."""
        value = self.make().detach().contiguous()
        assert tuple(value.shape) == self.shape, f"{self.name}: {tuple(value.shape)} is not {self.shape}"
        assert value.dtype == self.dtype, f"{self.name}: {value.dtype} is not {self.dtype}"
        return value


class Weights:
    """Parameters in the order in which they were asked for first. ``source`` gives the program's tensors by name."""

    def __init__(self, source: Callable[[str], torch.Tensor]) -> None:
        self.source = source
        self._made: dict[str, Weight] = {}

    def plain(self, name: str) -> Any:
        """The parameter as it is in the program, as a relax.Var."""
        tensor = self.source(name)
        return self.packed(name, "", tuple(tensor.shape), tensor.dtype, lambda: self.source(name))

    def packed(self, name: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, make: Make) -> Any:
        """The parameter ``name`` in another ``layout`` (a few letters that tell layouts apart), as a relax.Var.

        Asking again for the same name and layout gives the same variable.
        """
        from tvm import relax

        from moeify.backends.tvm.types import tensor_type

        key = f"{name}:{layout}" if layout else name
        if key not in self._made:
            var = relax.Var(f"weight{len(self._made)}", tensor_type(shape, dtype))
            self._made[key] = Weight(key, tuple(shape), dtype, var, make)
        have = self._made[key]
        assert (have.shape, have.dtype) == (tuple(shape), dtype), f"{key} was {have.shape} {have.dtype}"
        return have.var

    def __iter__(self) -> Any:
        return iter(self._made.values())

    def __len__(self) -> int:
        return len(self._made)
