"""moeify.json comes from whoever sent the folder: what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from moeify.backends.inputs import Spec
from moeify.backends.tvm.header import BadHeader, parse

GOOD: dict[str, Any] = {
    "format": 1,
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["rows", 8]}],
    "outputs": [{"dtype": "bool", "shape": ["2*rows"]}],
    "weights": ["w"],
    "target": "llvm -mcpu=znver3",
    "device": "cpu",
    "needs": {"apache-tvm": "0.27.0"},
}


def test_what_it_says() -> None:
    header = parse({**GOOD, "ranges": {"rows": [1, None]}, "cpu_flags": ["avx2"], "report": {}})
    assert header.inputs == (Spec("x", "float32", ("rows", 8)),)
    assert header.outputs == (Spec("", "bool", ("2*rows",)),)
    assert (header.weights, header.device, header.cpu_flags) == (("w",), "cpu", ("avx2",))
    assert header.ranges == {"rows": (1, None)}
    assert parse(GOOD).ranges == {}


def _input(**values: Any) -> dict[str, Any]:
    return {"inputs": [{**GOOD["inputs"][0], **values}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"format": "1"}, "its format is '1' and this reads 1"),
    ({"inputs": {}}, "inputs is not a list"),
    ({"inputs": ["x"]}, "inputs[0] is not an object"),
    ({"inputs": GOOD["inputs"] * 2}, "two inputs have one name"),
    (_input(name=""), "inputs[0].name is '', not a text"),
    (_input(name=["x"]), "inputs[0].name is ['x'], not a text"),
    (_input(dtype="float33"), "inputs[0] has the type 'float33'"),
    (_input(shape="88"), "inputs[0].shape is not a list"),
    (_input(shape=[-1]), "inputs[0] has a size of -1"),
    (_input(shape=[2**63]), f"inputs[0] has a size of {2**63}"),
    (_input(shape=[True]), "inputs[0] has a size of True"),
    (_input(shape=[1.5]), "inputs[0] has a size of 1.5"),
    (_input(shape=[""]), "inputs[0] has a size of ''"),
    ({"weights": [1]}, "weights[0] is 1, not a text"),
    ({"weights": ["w", "w"]}, "two weights have one name"),
    ({"weights": ["w"] * 1_000_000}, "weights is not a list"),
    ({"device": "tpu"}, "its device is 'tpu', not cpu or cuda"),
    ({"target": None}, "target is None, not a text"),
    ({"needs": []}, "needs is not an object"),
    ({"needs": {"apache-tvm": 0.27}}, "needs.apache-tvm is 0.27, not a text"),
    ({"ranges": {"rows": 3}}, "the range of 'rows' is no pair"),
    ({"ranges": {"rows": "12"}}, "the range of 'rows' is no pair"),
    ({"ranges": {"rows": [4, 3]}}, "the range of 'rows' is 4 to 3"),
    ({"ranges": {"rows": [None, 3]}}, "the range of 'rows' is None to 3"),
    ({"ranges": {"rows": [0, "9"]}}, "the range of 'rows' is 0 to '9'"),
    ({"cpu_flags": [0]}, "cpu_flags is 0, not a text"),
]


@pytest.mark.parametrize(("change", "what"), BAD, ids=[what[:40] for _, what in BAD])
def test_refuses(change: dict[str, Any], what: str) -> None:
    with pytest.raises(BadHeader) as error:
        parse({**GOOD, **change})
    assert str(error.value) == what


@pytest.mark.parametrize("key", sorted(GOOD))
def test_every_key_is_needed(key: str) -> None:
    with pytest.raises(BadHeader):
        parse({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize("data", [None, [], "x", 1])
def test_refuses_what_is_no_object(data: Any) -> None:
    with pytest.raises(BadHeader, match="it is not a JSON object"):
        parse(data)
