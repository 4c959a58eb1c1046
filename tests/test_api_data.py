from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from moeify.data.tensors import read
from moeify.errors import BadInputSpec, UnreadableFile
from moeify.ir.program import InputSpec

SPECS = (InputSpec("ids", torch.int64, ("batch", "seq")), InputSpec("mask", torch.float32, ("batch", 4)))
IDS, MASK = torch.arange(6).reshape(2, 3), torch.ones(2, 4)


@pytest.mark.parametrize("kind", ["dict.pt", "list.pt", "d.npz", "d.safetensors"])
def test_every_format_gives_the_tensors_in_order(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    tensors = {"mask": MASK, "ids": IDS}
    if kind == "dict.pt":
        torch.save(tensors, path)
    elif kind == "list.pt":
        torch.save([IDS, MASK], path)
    elif kind == "d.npz":
        numpy.savez(path, **{k: v.numpy() for k, v in tensors.items()})
    else:
        save_file(tensors, path)
    ids, mask = read(path, SPECS)
    assert torch.equal(ids, IDS)
    assert torch.equal(mask, MASK)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/canary",)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    (tmp_path / "e.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UnreadableFile):
        read(tmp_path / "e.pt", SPECS)
    torch.save({"ids": Evil()}, tmp_path / "z.pt")
    with pytest.raises(UnreadableFile) as error:
        read(tmp_path / "z.pt", SPECS)
    assert error.value.what == f"the data {tmp_path}/z.pt holds more than tensors, so it was not read"


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"ids": IDS}, "{path} has no tensor named 'mask'"),
        ([IDS], "{path} holds 1 tensors and the model reads 2"),
        (
            {"ids": IDS, "mask": torch.ones(2, 5)},
            "{path}: mask has shape (2, 5), the model reads mask=float32[batch, 4]",
        ),
        (
            {"ids": IDS, "mask": MASK * float("nan")},
            "{path}: mask holds NaN: nothing can be compared on it",
        ),
        ({"ids": IDS[:, :0], "mask": MASK}, "{path}: ids is empty: nothing can be compared on it"),
        ({"ids": IDS.float(), "mask": MASK}, "{path}: ids is float32, the model reads ids=int64[batch, seq]"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, tensors, text: str) -> None:
    path = tmp_path / "d.pt"
    torch.save(tensors, path)
    with pytest.raises(BadInputSpec) as error:
        read(path, SPECS)
    assert error.value.what == text.format(path=path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.pt", b""), ("d.pt", b"hello world"), ("d.npz", b"PK"), ("d.safetensors", b"x"), ("d.csv", b"1,2")],
)
def test_unreadable(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile):
        read(tmp_path / name, SPECS)
    with pytest.raises(UnreadableFile):
        read(tmp_path / ("missing-" + name), SPECS)
