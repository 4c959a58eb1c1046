"""Files made to hurt: random damage, zip bombs, modules and configs that no constructor would make."""

import json
import random
import struct
import sys
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from moeify.errors import InputError, MoeifyError, NonFiniteWeights, StateDictMismatch, UnreadableFile
from moeify.frontend import load


def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def factory(monkeypatch):
    monkeypatch.setitem(sys.modules, "some_factory", sys.modules[__name__])
    return "some_factory:build"


def write(kind, path):
    if kind == "safetensors":
        safetensors.torch.save_file(build().state_dict(), path)
    elif kind == "pt2":
        torch.export.save(torch.export.export(build(), (torch.randn(2, 4),)), path)
    elif kind == "legacy":
        torch.save(build().state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(build(), path)


@pytest.mark.parametrize("kind", ["module", "legacy", "safetensors", "pt2"])
def test_random_damage_is_reported_as_an_error_of_ours(kind, factory, tmp_path):
    path = tmp_path / "model.pt2"
    write(kind, path)
    content = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(40 if kind == "pt2" else 150):
        damaged = bytearray(content)
        if draw.random() < 0.4:
            del damaged[draw.randrange(len(damaged)) :]
        for _ in range(draw.choice([1, 4]) if damaged else 0):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the damage
            try:
                load(path, factory=factory)
            except MoeifyError:
                refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("cls", "args"),
    [(nn.MultiheadAttention, (10, 3)), (nn.GroupNorm, (0, 3)), (nn.Linear, (2,)), (nn.Linear, (-1, 2))],
    ids=["assertion", "division by zero", "type error", "negative size"],
)
def test_a_constructor_that_fails_is_damage(cls, args, tmp_path):
    class Calls:
        def __reduce__(self):
            return cls, args

    torch.save(Calls(), tmp_path / "model.pt")
    with pytest.raises(UnreadableFile, match="is truncated or damaged: "):
        load(tmp_path / "model.pt")


def _no_module(model):
    model._modules["0"] = 3


def _no_tensor(model):
    model[0]._parameters["weight"] = 3


def _no_dictionary(model):
    model.__dict__["_modules"] = None


@pytest.mark.parametrize("harm", [_no_module, _no_tensor, _no_dictionary])
def test_modules_of_wrong_parts(harm, tmp_path):
    model = build()
    harm(model)
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(UnreadableFile) as error:
        load(tmp_path / "model.pt")
    assert str(error.value) == (
        f"{tmp_path / 'model.pt'} is damaged: it holds a Sequential with parts that are neither modules nor tensors\n"
        "  hint: copy or download it again"
    )


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "model.pt")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "model.pt") as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made:
        for record in source.infolist():
            made.writestr(record.filename, source.read(record))
        size = sum(record.file_size for record in made.infolist())
    with pytest.raises(UnreadableFile) as error:
        load(bomb)
    assert str(error.value) == (
        f"{bomb} would unpack to {size} bytes, more than the file has\n"
        "  hint: save it with torch.save or torch.export.save, which do not compress"
    )


def test_a_state_dict_has_names(factory, tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(UnreadableFile, match="holds a dict, neither a module nor a state_dict"):
        load(tmp_path / "model.pt", factory=factory)


def test_weights_that_cannot_be_copied(factory, tmp_path):
    path = tmp_path / "model.pt"
    state = build().state_dict()
    torch.save({**state, "0.weight": state["0.weight"].to_sparse()}, path)
    with pytest.raises(StateDictMismatch) as error:
        load(path, factory=factory)
    assert error.value.what.startswith(f"{path} does not load into the module that {factory} builds: ")


@pytest.mark.parametrize("convert", [lambda w: w.to(torch.float8_e4m3fn), lambda w: w.to_sparse()])
def test_weights_of_any_dtype_and_layout_are_looked_at(convert, tmp_path):
    path = tmp_path / "model.pt"
    model = build()
    model[0].weight = nn.Parameter(convert(model[0].weight.detach()))
    torch.save(model, path)
    load(path)
    model[2].bias.data[0] = float("nan")
    torch.save(model, path)
    with pytest.raises(NonFiniteWeights, match=r"the weight 2\.bias of"):
        load(path)


def test_buffers_may_hold_infinity_but_not_nan(tmp_path):
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].running_var[0] = float("inf")
    torch.save(model, path)
    load(path)
    model[0].running_mean[0] = float("nan")
    torch.save(model, path)
    with pytest.raises(NonFiniteWeights, match=r"the weight 0\.running_mean of"):
        load(path)


# --- Hugging Face folders -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "model"
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": {"": "someone/kernel@main"}},
        {"text_config": {"_experts_implementation": "someone/kernel"}},
    ],
)
def test_kernels_of_the_hub_are_refused(changes, folder):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=r"asks for code from the Hub .*; nothing of the folder was executed"):
        load(folder)


@pytest.mark.parametrize("names", [5, "BertModel", {"BertModel": 1}])
def test_architectures_are_a_list(names, folder):
    edit_config(folder, architectures=names)
    with pytest.raises(UnreadableFile) as error:
        load(folder)
    assert str(error.value) == f"the architectures of {folder / 'config.json'} are not a list of names"


def test_a_layer_is_no_model(folder):
    edit_config(folder, architectures=["BertLayer"])
    with pytest.raises(InputError, match="has no model class 'BertLayer'"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_json(name, folder):
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(UnreadableFile, match=f"cannot read .*{name}"):
        load(folder)


def test_an_index_that_names_a_folder(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": ""}}')
    with pytest.raises(UnreadableFile) as error:
        load(folder)
    assert str(error.value) == f"{folder} is not a file"


def test_weights_of_another_model(folder):
    safetensors.torch.save_file({"a": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StateDictMismatch) as error:
        load(folder)
    assert "of the 23 weights of BertModel are not in" in str(error.value)
    assert error.value.hint == "do config.json and the safetensors files belong together?"


def test_a_header_that_claims_too_much(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UnreadableFile, match="transformers cannot load"):
        load(folder)
