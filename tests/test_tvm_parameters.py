"""params.safetensors: a file that everybody reads, written without holding the model twice."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
import tvm

from moeify.backends.tvm import parameters
from moeify.backends.tvm.weights import Weight, Weights
from moeify.errors import UnreadableFile

VALUES = {
    "float32": torch.randn(3, 5),
    "float16": torch.randn(7).half(),
    "bfloat16": torch.randn(2, 3, 2).bfloat16(),
    "bits": torch.arange(5, dtype=torch.int32).to(torch.uint16),
    "int64": torch.tensor([-1, 2**40]),
    "int8": torch.tensor([[-128], [127]], dtype=torch.int8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "float64": torch.randn(2).double(),
}


def written(file: Path, values: dict[str, torch.Tensor] = VALUES) -> Weights:
    weights = Weights(values.__getitem__)
    for name in values:
        weights.plain(name)
    parameters.write(file, list(weights))
    return weights


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    weights = written(tmp_path / "w")
    read = safetensors.torch.load_file(tmp_path / "w")
    assert set(read) == set(VALUES)
    for name, value in VALUES.items():
        assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
        assert torch.equal(read[name], value)
    assert parameters.size(list(weights)) == (tmp_path / "w").stat().st_size


def test_they_are_read_in_the_order_asked_for_and_aligned(tmp_path: Path) -> None:
    written(tmp_path / "w")
    names = sorted(VALUES, reverse=True)
    for name, made in zip(names, parameters.read(tmp_path / "w", names, tvm.cpu())):
        assert str(made.dtype) == str(VALUES[name].dtype).removeprefix("torch.")
        assert tuple(made.shape) == tuple(VALUES[name].shape)
        assert made.data_ptr() % 64 == 0
        assert torch.equal(torch.from_dlpack(made), VALUES[name])


def test_a_longer_file_is_cut(tmp_path: Path) -> None:
    """Room was reserved, or something else was there."""
    (tmp_path / "w").write_bytes(bytes(10_000))
    written(tmp_path / "w", {"a": torch.ones(2)})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w")["a"], torch.ones(2))


def test_one_value_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []

    def make() -> torch.Tensor:
        assert not any(one() is not None for one in alive)
        value = torch.ones(4)
        alive.append(weakref.ref(value))
        return value

    parameters.write(tmp_path / "w", [Weight(str(n), (4,), torch.float32, None, make) for n in range(3)])
    assert len(alive) == 3


def test_refuses_files(tmp_path: Path) -> None:
    file = tmp_path / "w"
    with pytest.raises(UnreadableFile, match="cannot read the weights"):
        parameters.read(file, ["a"], tvm.cpu())
    written(file, {"a": torch.ones(2)})
    with pytest.raises(UnreadableFile, match="the weights are of another library: 'b' is in only one of the two"):
        parameters.read(file, ["a", "b"], tvm.cpu())
    for content in (b"", b"x" * 7, (2**60).to_bytes(8, "little") + b"{}", file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(UnreadableFile, match="cannot read the weights"):
            parameters.read(file, ["a"], tvm.cpu())


def test_numpy_reads_half_precision(tmp_path: Path) -> None:
    written(tmp_path / "w", {"a": torch.tensor([1.5]).bfloat16()})
    (made,) = parameters.read(tmp_path / "w", ["a"], tvm.cpu())
    assert made.numpy().astype(numpy.float32).tolist() == [1.5]
