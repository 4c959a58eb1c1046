"""What a compiled program is given, held against what it takes, before it runs. torch is not imported here: a compiled
program runs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeify.errors import BadInputSpec

Inputs = Mapping[str, Any] | Sequence[Any]
Ranges = Mapping[str, tuple[int, int | None]]


@dataclass(frozen=True)
class Spec:
    """One input or output. ``shape`` holds an int for a fixed size and a name (or an expression) for a dynamic one.

    ``dtype`` is spelled as the runtime does. Outputs may have the name "".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Taken:
    """The inputs that a program takes, by name and in its order.

    ``owner`` is what the program is called in messages, ``spelled`` gives the dtype of a tensor or array as the specs
    have it, ``ranges`` the smallest and largest value (None: no bound) of a dynamic dimension.
    """

    owner: str
    specs: Mapping[str, Spec]
    spelled: Callable[[Any], str]
    ranges: Ranges = field(default_factory=dict)

    def named(self, inputs: Inputs) -> dict[str, Any]:
        """The inputs by name in the program's order. Raises BadInputSpec for a name, type or shape that is not it."""
        names = ", ".join(self.specs)
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(self.specs):
                raise BadInputSpec(
                    f"{self.owner} takes {len(self.specs)} inputs and was given {len(inputs)}",
                    hint=f"in this order: {names}",
                )
            inputs = dict(zip(self.specs, inputs))
        wrong = sorted(inputs.keys() ^ self.specs.keys())
        if wrong:
            what = "has no input" if wrong[0] in inputs else "needs the input"
            raise BadInputSpec(f"{self.owner} {what} {wrong[0]!r}", hint=f"its inputs are {names}")
        sizes: dict[str, tuple[int, str]] = {}
        for name, spec in self.specs.items():
            self.check(spec, inputs[name], sizes)
        return {name: inputs[name] for name in self.specs}

    def check(self, spec: Spec, value: Any, sizes: dict[str, tuple[int, str]]) -> None:
        """One value. ``sizes`` collects what the named dimensions of earlier ones were. Raises BadInputSpec."""
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise BadInputSpec(f"{spec.name!r} must be a tensor or an array, not a {type(value).__name__}")
        if self.spelled(value) != spec.dtype:
            raise BadInputSpec(f"{spec.name!r} must be of {spec.dtype}, not of {self.spelled(value)}")
        shape = tuple(value.shape)
        text = f"{spec.name!r} must have the shape [{', '.join(map(str, spec.shape))}], not {list(shape)}"
        if len(shape) != len(spec.shape):
            raise BadInputSpec(text)
        for have, want in zip(shape, spec.shape):
            if isinstance(want, int) and have != want:
                raise BadInputSpec(text)
            if isinstance(want, str):
                self._check_size(spec.name, want, have, sizes)

    def _check_size(self, name: str, dim: str, have: int, sizes: dict[str, tuple[int, str]]) -> None:
        before, owner = sizes.setdefault(dim, (have, name))
        if before != have:
            raise BadInputSpec(f"{dim} is {before} in {owner!r} and {have} in {name!r}")
        low, high = self.ranges.get(dim, (0, None))
        if have < low or (high is not None and have > high):
            span = f"at least {low}" if high is None else f"{low} to {high}"
            raise BadInputSpec(f"{dim} is {have} in {name!r}: {self.owner} was compiled for {span}")
