"""Model files: what is read, and what every bad file is told."""

import json
import shutil
import sys
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

from moeify.errors import (
    InputError,
    NonFiniteWeights,
    StateDictMismatch,
    TorchScriptFile,
    UnreadableFile,
    UsageError,
)
from moeify.frontend import load

READS = "moeify reads .pt, .pt2 and .safetensors files and Hugging Face folders"


def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def factory(monkeypatch):
    monkeypatch.setitem(sys.modules, "some_factory", sys.modules[__name__])
    return "some_factory:build"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path} is empty"),
        (b"\xff\xd8\xff\xe0 a picture", "{path} is a JPEG image, not a model\n  hint: " + READS),
        (b"hello, this is a text\n", "{path} is a text file, not a model\n  hint: " + READS),
        (b"\x00\x01\x02" * 40, "{path} is of an unknown kind\n  hint: " + READS),
        (
            b"GGUF\x03\x00",
            "{path} is a GGUF file, whose weights are quantised, not a model\n  hint: " + READS,
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
            "{path} is a git-lfs pointer, not the file it points to\n  hint: fetch it with git lfs pull",
        ),
        (b"PK\x03\x04" + b"\x00" * 50, "{path} is truncated or damaged\n  hint: copy or download it again"),
    ],
)
def test_files_that_are_no_models(content, message, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as error:
        load(path)
    assert str(error.value) == message.format(path=path)
    assert error.value.exit_code == 3


def test_missing_files(tmp_path):
    with pytest.raises(UnreadableFile) as error:
        load(tmp_path / "none.pt")
    assert str(error.value) == f"there is no file {tmp_path / 'none.pt'}"


def test_truncated_files(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(build(), path)
    content = path.read_bytes()
    for size in (10, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:size])
        with pytest.raises(UnreadableFile) as error:
            load(path)
        assert str(error.value) == f"{path} is truncated or damaged\n  hint: copy or download it again"
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(build().state_dict(), weights)
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(UnreadableFile, match="is truncated or damaged: "):
        load(weights)
    old = tmp_path / "old.pt"
    torch.save(build().state_dict(), old, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes()[:-100])
    with pytest.raises(UnreadableFile):
        load(old)


def test_other_zip_archives(tmp_path):
    shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path)
    with pytest.raises(UnreadableFile) as error:
        load(tmp_path / "a.zip")
    assert str(error.value) == f"{tmp_path / 'a.zip'} is a zip archive and no model\n  hint: {READS}"


def test_torchscript(tmp_path):
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(build(), torch.randn(2, 4)), path)
    with pytest.raises(TorchScriptFile) as error:
        load(path)
    assert str(error.value) == (
        f"{path} is a TorchScript archive: it holds compiled code and no module that torch.export can read\n"
        "  hint: save the Python model instead: torch.save(model.state_dict(), ...) and --factory, or torch.export.save"
    )


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "wrapped"])
def test_a_state_dict_with_a_factory(kind, factory, tmp_path):
    model = build()
    path = tmp_path / "weights"
    if kind == "safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "model_state_dict": model.state_dict()}, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    loaded = load(path, factory=factory)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value)
    assert not loaded.module.training
    assert len(loaded.sha256) == 64
    if kind == "wrapped":
        assert loaded.notes == (f"the state_dict is the entry 'model_state_dict' of {path}",)
    with pytest.raises(UnreadableFile) as error:
        load(path)
    assert str(error.value) == (
        f"{path} is a state_dict: weights without a model\n"
        "  hint: say what builds the model: --factory pkg.mod:function"
    )


def test_a_state_dict_that_does_not_fit(factory, tmp_path):
    state = build().state_dict()
    state["0.weight"] = torch.zeros(3, 4)
    state["3.weight"] = state.pop("2.weight")
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(StateDictMismatch) as error:
        load(path, factory=factory)
    assert str(error.value) == (
        f"{path} does not fit the module that {factory} builds\n    missing: 2.weight\n    unexpected: 3.weight\n"
        "    wrong shape: 0.weight ([3, 4] in the file, [8, 4] in the model)"
    )
    torch.save({f"module.{name}": value for name, value in build().state_dict().items()}, path)
    with pytest.raises(StateDictMismatch, match=r"hint: the names start with module\.: "):
        load(path, factory=factory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "cannot read the factory 'no_colon'\n  hint: write pkg.mod:function"),
        (
            "no_such_package:fn",
            (
                "cannot import the factory no_such_package:fn: ModuleNotFoundError: No module named 'no_such_package'\n"
                "  hint: run moeify where it can be imported, for example with PYTHONPATH"
            ),
        ),
        ("builtins:dict", "the factory builtins:dict returns dict, not an nn.Module"),
        ("some_factory:fails", "the factory some_factory:fails fails: ValueError: no weights here"),
    ],
)
def test_factories_that_do_not_work(name, message, factory, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(build().state_dict(), path)
    with pytest.raises(UsageError) as error:
        load(path, factory=name)
    assert str(error.value) == message
    assert error.value.exit_code == 2


def fails():
    raise ValueError("no weights here")


def test_a_module_needs_no_factory(factory, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(build(), path)
    assert load(path, factory=factory).notes == (f"the factory {factory} is not used: {path} holds a whole module",)


def test_weights_that_are_not_finite(tmp_path):
    path = tmp_path / "model.pt"
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    torch.save(model, path)
    with pytest.raises(NonFiniteWeights) as error:
        load(path)
    assert str(error.value) == (
        f"the weight 0.weight of {path} holds NaN or infinity\n"
        "  hint: the training run that wrote it has diverged: take an earlier checkpoint"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("inf"))
    torch.save(model, path)
    with pytest.raises(NonFiniteWeights) as error:
        load(path)
    assert error.value.what == f"6 weights of {path} hold NaN or infinity: 0.weight, 0.bias, 1.weight and 3 more"


# --- Hugging Face folders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("hf") / "bert"
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    model.save_pretrained(path)
    return path, model


@pytest.fixture
def folder(bert, tmp_path):
    return shutil.copytree(bert[0], tmp_path / "model")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_hugging_face_folder(bert):
    path, model = bert
    loaded = load(path)
    assert loaded.kind == "huggingface"
    assert type(loaded.module) is type(model)
    assert loaded.module.dtype is torch.float32
    assert not loaded.module.training
    assert loaded.notes == ()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value)


def test_shards_and_half_precision(bert, tmp_path):
    import copy

    model = copy.deepcopy(bert[1]).bfloat16()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    loaded = load(tmp_path / "sharded")
    assert loaded.module.dtype is torch.bfloat16
    next((tmp_path / "sharded").glob("model-*.safetensors")).unlink()
    with pytest.raises(UnreadableFile, match=r"there is no file .*model-0"):
        load(tmp_path / "sharded")


def test_code_in_the_folder_is_never_run(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (folder / "configuration_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModel": "modeling_evil.EvilModel"}
    edit_config(folder, auto_map=auto_map)
    load(folder)  # its class is one of transformers' own
    edit_config(folder, architectures=["EvilModel"])
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder} brings its own Python code for EvilModel; nothing of the folder was executed\n"
        "  hint: if you trust it, load the model yourself and call moeify.convert(model)"
    )
    assert not canary.exists()


def test_folders_that_do_not_load(folder, tmp_path):
    import transformers

    edit_config(folder, architectures=["NoSuchModel"])
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value) == (
        f"transformers {transformers.__version__} has no model class 'NoSuchModel'\n  at: {folder / 'config.json'}"
    )
    (folder / "config.json").write_text("[]")
    with pytest.raises(UnreadableFile) as error:
        load(folder)
    assert str(error.value) == f"{folder / 'config.json'} is not a JSON object"
    (folder / "config.json").write_text("{")
    with pytest.raises(UnreadableFile, match=r"cannot read .*config\.json"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableFile) as error:
        load(tmp_path / "empty")
    assert str(error.value) == (
        f"the folder {tmp_path / 'empty'} has no config.json\n"
        "  hint: give a Hugging Face folder (config.json and model.safetensors) or a file"
    )


def test_pickled_weights_in_a_folder(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnreadableFile) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder} holds its weights as pickles (pytorch_model.bin) and no model.safetensors\n"
        "  hint: convert them: load the model in transformers and call save_pretrained"
    )


def test_pointers_and_damage_in_a_folder(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnreadableFile, match="is a git-lfs pointer"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(UnreadableFile, match="transformers cannot load"):
        load(folder)


def test_missing_weights_are_noted(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("intermediate.dense.weight"))
    del weights[name]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).notes == (f"1 weight is not in {folder} and has random values: {name}",)


def test_a_checkpoint_of_ours(folder):
    (folder / "moeify.json").write_text("{}")
    with pytest.raises(UnreadableFile) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder} is a checkpoint that moeify has already converted\n  hint: open it with moeify.load"
    )


def test_without_transformers(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError) as error:
        load(bert[0])
    assert str(error.value) == (
        f"{bert[0]} is a Hugging Face folder, and transformers is not installed\n  hint: pip install 'moeify[hf]'"
    )
