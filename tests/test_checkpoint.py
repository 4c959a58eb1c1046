"""The checkpoint folder: what comes back, what a bad folder says, and that nothing is left half-written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeify import surgery
from moeify.errors import InputError, OutputNotWritten, StateDictMismatch, UnreadableFile, UsageError
from moeify.ir.report import Report
from moeify.surgery import folder, shards
from tests.surgery_models import MODELS, D, Encoder, Ffn, LstmLm, case, converted, layers, output

FACTORIES: dict[str, Any] = {"encoder": Encoder, "lstm": LstmLm}


def build_encoder() -> nn.Module:
    return Encoder()


def factory_of(name: str) -> Any:
    return FACTORIES.get(name) or (lambda: layers(name)) if not _is_transformers(name) else None


def _is_transformers(name: str) -> bool:
    return hasattr(case(name).dense, "config")


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    made = case(name)
    surgery.save(made.moe, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out", factory=factory_of(name))
    assert type(loaded) is type(made.dense)
    assert not any(module.training for module in loaded.modules())
    for tensors in ("named_parameters", "named_buffers"):
        before = dict(getattr(made.moe, tensors)(remove_duplicate=False))
        after = dict(getattr(loaded, tensors)(remove_duplicate=False))
        assert list(before) == list(after)
        for key, value in before.items():
            assert torch.equal(value, after[key]), key
            assert (value.dtype, value.requires_grad) == (after[key].dtype, after[key].requires_grad), key
    assert list(loaded.state_dict()) == list(made.moe.state_dict())
    assert torch.equal(output(loaded, made.inputs), output(made.moe, made.inputs))
    # Loading needs no weights and keeps ties; saving again gives the same files.
    assert len(list(loaded.parameters())) == len(list(made.moe.parameters()))
    surgery.save(loaded, tmp_path / "again", factory=None)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize(
    "recipe", [{"router": "hash"}, {"method": "granular", "shared": 1, "shared_gate": True}], ids=str
)
def test_other_recipes_come_back(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = case("gpt2")
    moe = converted(copy.deepcopy(made.dense), made.inputs, **recipe).moe
    surgery.save(moe, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert torch.equal(output(loaded, made.inputs), output(moe, made.inputs))


def test_generation_config_and_report_come_back(tmp_path: Path) -> None:
    moe: Any = case("llama").copy()
    moe.generation_config.max_new_tokens = 3
    moe.moeify_report = Report(model="LlamaForCausalLM", verified=True)
    surgery.save(moe, tmp_path / "out")
    loaded: Any = surgery.load(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.moeify_report == moe.moeify_report
    assert loaded.config._attn_implementation == moe.config._attn_implementation


def test_mixed_dtypes_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    moe = case("encoder").copy().to(torch.bfloat16)
    moe.get_parameter("encoder.layers.0.norm1.weight").requires_grad_(False)
    surgery.save(moe, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out", factory=Encoder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["encoder.layers.0.norm1.weight"]


def test_shards_have_a_size(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(5)}
    index = shards.write(tensors, tmp_path, "moeify", limit=40)
    assert index == {
        "t0": "moeify-00001-of-00003.safetensors",
        "t1": "moeify-00001-of-00003.safetensors",
        "t2": "moeify-00002-of-00003.safetensors",
        "t3": "moeify-00002-of-00003.safetensors",
        "t4": "moeify-00003-of-00003.safetensors",
    }
    read = {name: value for file in sorted(set(index.values())) for name, value in shards.read(tmp_path / file)}
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_loading_makes_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surgery.save(case("llama").moe, tmp_path / "out")

    def forbidden(self: Any, read: Any) -> None:
        raise AssertionError("computed a weight")

    monkeypatch.setattr("moeify.ir.weights.WeightRecipe.materialise", forbidden)
    real: list[torch.Size] = []
    normal = torch.Tensor.normal_

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.device.type != "meta":
            real.append(self.shape)
        return normal(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", watched)
    surgery.load(tmp_path / "out")
    assert not real


# --- what a folder may not do -------------------------------------------------------------------------------------


def test_a_factory_that_the_folder_names_is_not_imported(tmp_path: Path) -> None:
    made = case("encoder")
    surgery.save(made.moe, tmp_path / "out", factory="tests.test_checkpoint:build_encoder")
    with pytest.raises(InputError) as caught:
        surgery.load(tmp_path / "out")
    assert str(caught.value) == (
        "the checkpoint asks to import tests.test_checkpoint:build_encoder; nothing was imported\n"
        "  hint: if you trust it, pass allow=('tests',)"
    )
    for trust in ({"allow": ("tests",)}, {"factory": "tests.test_checkpoint:build_encoder"}, {"factory": Encoder}):
        loaded = surgery.load(tmp_path / "out", **trust)  # type: ignore[arg-type]
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


# --- bad folders --------------------------------------------------------------------------------------------------


def _edit(target: Path, change: Any) -> None:
    data = json.loads((target / "moeify.json").read_text())
    change(data)
    (target / "moeify.json").write_text(json.dumps(data))


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


# --- writing ------------------------------------------------------------------------------------------------------


def _content(target: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in target.iterdir()}


def test_replaces_its_own_folder(saved: Path) -> None:
    changed = case("encoder").copy()
    with torch.no_grad():
        changed.get_parameter("encoder.layers.0.norm1.weight").fill_(3)
    (saved / "moeify-00002-of-00002.safetensors").write_text("from an earlier, larger save")
    surgery.save(changed, saved)
    assert not (saved / "moeify-00002-of-00002.safetensors").exists()
    inputs = case("encoder").inputs
    assert torch.equal(output(surgery.load(saved, factory=Encoder), inputs), output(changed, inputs))
    assert [file.name for file in saved.parent.iterdir()] == ["out"]


def test_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputNotWritten) as caught:
        surgery.save(case("encoder").moe, tmp_path / "out")
    assert str(caught.value) == (
        f"the folder {tmp_path / 'out'} holds files that moeify did not write\n"
        "  hint: choose another folder, or empty this one yourself"
    )
    assert _content(tmp_path / "out") == {"thesis.txt": b"mine"}
    with pytest.raises(OutputNotWritten, match=r"thesis.txt is a file, not a folder"):
        surgery.save(case("encoder").moe, tmp_path / "out" / "thesis.txt")


def _fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """The call-th rename fails; the ones that undo do not."""
    calls = iter(range(1, 1000))
    replace = os.replace

    def failing(source: Any, to: Any) -> None:
        if next(calls) == call:
            raise error
        replace(source, to)

    monkeypatch.setattr(folder.os, "replace", failing)


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failed_rename_is_undone(
    saved: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException
) -> None:
    (saved / "notes.txt").write_text("mine")
    before = _content(saved)
    _fail_at(monkeypatch, call, error)
    with pytest.raises(OutputNotWritten if isinstance(error, OSError) else KeyboardInterrupt):
        surgery.save(case("encoder").moe, saved)
    assert _content(saved) == before
    assert [file.name for file in saved.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    if existing:
        surgery.save(case("encoder").moe, tmp_path / "out")
        before = _content(tmp_path / "out")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OutputNotWritten) as caught:
        surgery.save(case("encoder").moe, tmp_path / "out")
    assert str(caught.value) == (
        f"cannot write the checkpoint folder {tmp_path / 'out'}: no space left on device\n"
        "  hint: nothing was changed; free space or choose another folder"
    )
    if existing:
        assert _content(tmp_path / "out") == before
    assert [file.name for file in tmp_path.iterdir()] == (["out"] if existing else [])


def test_a_folder_can_move(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "moved")
    inputs = case("encoder").inputs
    loaded = surgery.load(tmp_path / "moved", factory=Encoder)
    assert torch.equal(output(loaded, inputs), output(case("encoder").moe, inputs))
