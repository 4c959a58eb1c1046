"""New parameters as recipes: which dense parameters they are made from, and how. Values are computed when needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moeify.ir.block import WeightRef


@dataclass(frozen=True)
class WeightRecipe:
    """A new parameter: ``compute(*canonical sources)`` gives its value.

    ``sources`` are read through their WeightRef, so ``compute`` sees canonical layouts (``[out, in]``, ``[out]``).
    ``shape`` is the shape of the result. ``compute`` must be deterministic: random parts draw from
    ``generator_for(seed, name)``.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[WeightRef, ...]
    compute: Callable[..., torch.Tensor]
    dtype: torch.dtype = torch.float32

    def materialise(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The value; ``read`` gives a dense parameter by name."""
        with torch.no_grad():
            value = self.compute(*(ref.read(read(ref.parameter)) for ref in self.sources))
        if tuple(value.shape) != self.shape:
            raise AssertionError(f"{self.name}: recipe promises {self.shape}, computed {tuple(value.shape)}")
        return value.to(self.dtype).contiguous()


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator whose stream depends on the seed and the parameter's name only, not on the order of computation."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def total_bytes(recipes: Sequence[WeightRecipe]) -> int:
    """Bytes of all values together."""
    return sum(torch.Size(r.shape).numel() * r.dtype.itemsize for r in recipes)
