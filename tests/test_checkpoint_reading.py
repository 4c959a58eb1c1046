"""What a checkpoint folder may not do when it is read, and what a bad one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeify import surgery
from moeify.errors import InputError, StateDictMismatch, UnreadableFile, UsageError
from moeify.surgery.layout import FIELDS
from tests.surgery_models import D, Encoder, Ffn, case, layers, output


def build_encoder() -> nn.Module:
    return Encoder()


def _edit(target: Path, change: Any) -> None:
    data = json.loads((target / "moeify.json").read_text())
    change(data)
    (target / "moeify.json").write_text(json.dumps(data))


def test_a_factory_that_the_folder_names_is_not_imported(tmp_path: Path) -> None:
    made = case("encoder")
    surgery.save(made.moe, tmp_path / "out", factory="tests.test_checkpoint_reading:build_encoder")
    with pytest.raises(InputError) as caught:
        surgery.load(tmp_path / "out")
    assert str(caught.value) == (
        "the checkpoint asks to import tests.test_checkpoint_reading:build_encoder; nothing was imported\n"
        "  hint: if you trust it: --allow tests.test_checkpoint_reading, or allow=('tests.test_checkpoint_reading',) "
        "in Python"
    )
    for trust in (
        {"allow": ("tests",)},
        {"factory": "tests.test_checkpoint_reading:build_encoder"},
        {"factory": Encoder},
    ):
        loaded = surgery.load(tmp_path / "out", **trust)
        assert torch.equal(output(loaded, made.inputs), output(made.moe, made.inputs))


def test_a_class_outside_transformers_is_not_imported(tmp_path: Path) -> None:
    surgery.save(case("llama").moe, tmp_path / "out")
    _edit(tmp_path / "out", lambda data: data["skeleton"].update(module="os", **{"class": "system"}))
    with pytest.raises(InputError, match=r"^the checkpoint asks to import os:system; nothing was imported"):
        surgery.load(tmp_path / "out")


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    surgery.save(case("encoder").moe, tmp_path / "out")
    _edit(tmp_path / "out", lambda data: data["weights"].update({next(iter(data["weights"])): "../x.safetensors"}))
    with pytest.raises(UnreadableFile, match=r"names the file '../x.safetensors' outside its folder"):
        surgery.load(tmp_path / "out", factory=Encoder)


def test_an_activation_names_operators_only(tmp_path: Path) -> None:
    surgery.save(case("prelu").moe, tmp_path / "out")

    def plant(data: Any) -> None:
        node = next(n for n in data["blocks"][0]["region"]["nodes"] if n["op"] == "call_function")
        node["target"] = "os.system"

    _edit(tmp_path / "out", plant)
    with pytest.raises(UnreadableFile) as caught:
        surgery.load(tmp_path / "out", factory=lambda: layers("prelu"))
    assert str(caught.value) == "the graph of an activation calls os.system, which does not exist here"


def _error(target: Path, kind: type[Exception] = UnreadableFile, factory: Any = Encoder) -> str:
    with pytest.raises(kind) as caught:
        surgery.load(target, factory=factory)
    return str(caught.value).replace(str(target), "OUT")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    surgery.save(case("encoder").moe, tmp_path / "out")
    return tmp_path / "out"


def test_no_marker(tmp_path: Path) -> None:
    assert _error(tmp_path) == (
        "OUT is not a checkpoint folder: it has no moeify.json\n  hint: give the folder that save wrote"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "other"}'])
def test_a_marker_that_is_none(saved: Path, text: str) -> None:
    (saved / "moeify.json").write_text(text)
    assert _error(saved).startswith(("cannot read OUT/moeify.json: ", "OUT/moeify.json does not describe a checkpoint"))


def test_another_version(saved: Path) -> None:
    _edit(saved, lambda data: data.update(format_version=7))
    assert _error(saved) == (
        "the checkpoint has format version 7, this moeify reads version 1\n"
        "  at: OUT\n"
        "  hint: install the version of moeify that wrote it"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in FIELDS for value in (3, [3], {"a": 3})
     if not (isinstance(value, dict) and name in ("skeleton", "versions", "provenance"))],
)  # fmt: skip
def test_a_field_of_another_kind(saved: Path, name: str, value: Any) -> None:
    marker = json.loads((saved / "moeify.json").read_text())
    (saved / "moeify.json").write_text(json.dumps({**marker, name: value}))
    with pytest.raises(UnreadableFile):
        surgery.load(saved, factory=Encoder)


def test_a_missing_field(saved: Path) -> None:
    _edit(saved, lambda data: data.pop("aliases"))
    assert _error(saved) == "OUT/moeify.json has no field 'aliases'"


def test_a_missing_file(saved: Path) -> None:
    (saved / "moeify-00001-of-00001.safetensors").unlink()
    assert _error(saved) == "the checkpoint's file moeify-00001-of-00001.safetensors is missing\n  at: OUT"


@pytest.mark.parametrize("size", [0, 5, 200, -10])
def test_a_truncated_file(saved: Path, size: int) -> None:
    file = saved / "moeify-00001-of-00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    text = _error(saved)
    assert text.startswith("moeify-00001-of-00001.safetensors is damaged or cut short: ")
    assert text.endswith("\n  at: OUT\n  hint: copy the folder again, all of it")


def test_names_that_do_not_fit(saved: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder().encoder
            self.head = nn.Linear(D, 2, bias=False)

    assert _error(saved, StateDictMismatch, Other) == (
        "the checkpoint does not fit its model: missing head.weight\n"
        "  at: OUT\n"
        "  hint: build the model with the code that the checkpoint was written with"
    )


def test_a_factory_of_another_model(saved: Path) -> None:
    assert _error(saved, StateDictMismatch, lambda: Ffn("silu")) == (
        "the checkpoint does not fit its model: it has no encoder.layers.0.linear1.weight\n"
        "  at: OUT\n"
        "  hint: build the model with the code that the checkpoint was written with"
    )


def test_shapes_that_do_not_fit(saved: Path) -> None:
    def wider() -> nn.Module:
        model = Encoder()
        model.encoder.layers[0].norm1 = nn.LayerNorm(D + 1)
        return model

    assert _error(saved, StateDictMismatch, wider) == (
        "encoder.layers.0.norm1.bias has shape [16] in the checkpoint and [17] in the model\n  at: OUT"
    )


def test_no_factory(saved: Path) -> None:
    assert _error(saved, UsageError, None) == (
        "the checkpoint does not say how to build its Encoder\n"
        "  hint: pass factory=, a function without arguments that returns the dense model, or its 'pkg.mod:function'"
    )


def test_only_converted_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        surgery.save(Encoder(), tmp_path / "out")
    assert str(caught.value) == (
        "this Encoder has not been converted\n  hint: pass the model that moeify.convert returned, not a part of it"
    )
    assert not list(tmp_path.iterdir())
