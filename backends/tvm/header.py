"""``moeify.json``: what a compiled library says of itself. Whoever sends a folder wrote it, so all of it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeify.backends.inputs import Spec
from moeify.backends.tvm.parameters import DTYPES

FORMAT = 1
DEVICES = ("cpu", "cuda")
_LARGEST = 2**62  # sizes are int64 in the library
_TOO_LONG = 10_000  # entries of a list; no model comes near


class BadHeader(ValueError):
    """What is wrong with it, in a few words."""


@dataclass(frozen=True)
class Header:
    """``weights`` are names in params.safetensors in the order in which the library takes them, after the inputs.

    ``needs`` are versions of packages; ``ranges`` the smallest and largest value (None: no bound) of a dynamic
    dimension; ``cpu_flags`` what the processor must have, as /proc/cpuinfo spells it. The last two may be absent.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    weights: tuple[str, ...]
    target: str
    device: str
    needs: Mapping[str, str]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    cpu_flags: tuple[str, ...] = ()


def parse(data: Any) -> Header:
    """Raises BadHeader."""
    if not isinstance(data, dict):
        raise BadHeader("it is not a JSON object")
    if data.get("format") != FORMAT:
        raise BadHeader(f"its format is {data.get('format')!r} and this reads {FORMAT}")
    inputs = tuple(_spec(one, f"inputs[{n}]", True) for n, one in enumerate(_list(data, "inputs")))
    if len({spec.name for spec in inputs}) != len(inputs):
        raise BadHeader("two inputs have one name")
    outputs = tuple(_spec(one, f"outputs[{n}]", False) for n, one in enumerate(_list(data, "outputs")))
    weights = tuple(_text(one, f"weights[{n}]") for n, one in enumerate(_list(data, "weights")))
    if len(set(weights)) != len(weights):
        raise BadHeader("two weights have one name")
    device = _text(data.get("device"), "device")
    if device not in DEVICES:
        raise BadHeader(f"its device is {device!r}, not {' or '.join(DEVICES)}")
    needs = {key: _text(value, f"needs.{key}") for key, value in _object(data, "needs").items()}
    ranges = {key: _range(value, key) for key, value in _object(data, "ranges", optional=True).items()}
    flags = tuple(_text(one, "cpu_flags") for one in _list(data, "cpu_flags", optional=True))
    return Header(inputs, outputs, weights, _text(data.get("target"), "target"), device, needs, ranges, flags)


def _spec(data: Any, where: str, named: bool) -> Spec:
    if not isinstance(data, dict):
        raise BadHeader(f"{where} is not an object")
    name = _text(data.get("name"), f"{where}.name") if named else ""
    dtype = _text(data.get("dtype"), f"{where}.dtype")
    if dtype not in DTYPES:
        raise BadHeader(f"{where} has the type {dtype!r}")
    return Spec(name, dtype, tuple(_size(size, where) for size in _list(data, "shape", where=where)))


def _size(size: Any, where: str) -> int | str:
    if isinstance(size, bool) or not isinstance(size, int | str) or size == "":
        raise BadHeader(f"{where} has a size of {size!r}")
    if isinstance(size, int) and not 0 <= size <= _LARGEST:
        raise BadHeader(f"{where} has a size of {size}")
    return size


def _range(data: Any, name: str) -> tuple[int, int | None]:
    if not isinstance(data, Sequence) or isinstance(data, str) or len(data) != 2:
        raise BadHeader(f"the range of {name!r} is no pair")
    low, high = data
    whole = [number for number in (low, high) if isinstance(number, int) and not isinstance(number, bool)]
    if low is None or len(whole) != 2 - (high is None) or not 0 <= low <= (_LARGEST if high is None else high):
        raise BadHeader(f"the range of {name!r} is {low!r} to {high!r}")
    return low, high


def _list(data: Mapping[str, Any], key: str, *, where: str = "", optional: bool = False) -> list[Any]:
    value = data.get(key, [] if optional else None)
    if not isinstance(value, list | tuple) or len(value) > _TOO_LONG:
        raise BadHeader(f"{where}{'.' * bool(where)}{key} is not a list")
    return list(value)


def _object(data: Mapping[str, Any], key: str, *, optional: bool = False) -> dict[str, Any]:
    value = data.get(key, {} if optional else None)
    if not isinstance(value, dict):
        raise BadHeader(f"{key} is not an object")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadHeader(f"{where} is {value!r}, not a text")
    return value
