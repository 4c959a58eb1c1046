"""Archives of torch.export: good ones load with their inputs, and every way of running code from one is
refused.

torch.export.load of torch 2.13 runs several of these even with TORCH_FORCE_WEIGHTS_ONLY_LOAD=1.
"""

import io
import json
import os
import pickle
import warnings

import pytest
import torch
from torch import nn

from moeify.errors import UnreadableFile, UnsafePickle
from moeify.frontend import capture, holds_metadata, load, read_pt2


class Runs:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "good.pt2"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)).eval()
    shapes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=shapes, strict=False)
    torch.export.save(exported, path, extra_files={"moeify.json": "{}"})
    return path, model


@pytest.fixture(scope="module")
def records(good):
    reader = torch._C.PyTorchFileReader(str(good[0]))
    return {name: reader.get_record(name) for name in reader.get_all_records()}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    path = tmp_path / "canary"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    yield path
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert not path.exists(), "the file was executed"


def write(path, records):
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in records.items():
        if name not in ("byteorder", "version", ".data/serialization_id"):  # the writer adds these
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


def test_a_good_archive(good):
    path, model = good
    loaded = load(path)
    assert loaded.kind == "pt2"
    (hint,) = loaded.input_hints
    assert (hint.name, hint.dims, hint.tensor.shape) == ("input", ("batch", 4), (3, 4))
    program = capture(loaded.module)
    assert [str(spec) for spec in program.inputs] == ["input=float32[batch, 4]"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(program.graph_module(x), model(x))
    assert set(dict(program.graph_module.named_parameters())) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert read_pt2(path, extra=("moeify.json", "other"))[1] == {"moeify.json": "{}", "other": ""}
    assert holds_metadata(path, "moeify.json")
    assert not holds_metadata(path, "other")
    assert not holds_metadata(__file__, "moeify.json")


def pickled(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def edited(records, edit):
    model = json.loads(records["models/model.json"])
    edit(model, model["graph_module"]["graph"])
    return {"models/model.json": json.dumps(model).encode()}


def attacks(records, canary):
    touch = f"touch {canary}"
    call = f"__import__('os').system('{touch}')"
    evil = pickled(((Runs(os.system, touch),), {}))

    def size(model, graph):
        graph["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = call

    def attribute(model, graph):
        graph["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = "Symbol.__init__.__globals__"

    def target(model, graph):
        graph["nodes"][1].update(
            target="torch.os.system", inputs=[{"name": "command", "arg": {"as_string": touch}, "kind": 1}]
        )

    def method(model, graph):
        graph["nodes"][1]["target"] = "_operator.methodcaller"

    def library(model, graph):
        graph["nodes"][1]["target"] = "torch.ops.load_library"

    def file(model, graph):
        graph["nodes"][1]["target"] = "torch.ops.aten.from_file.default"

    def argument(model, graph):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = [f"x={call}"]

    def node(model, graph):
        graph["nodes"][1]["name"] = f"x={call}"

    def parameter(model, graph):
        spec = model["graph_module"]["signature"]["input_specs"][0]
        spec["parameter"]["parameter_name"] = f'0.weight"), {call}, ("'

    def enum(model, graph):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = signature["in_spec"].replace(
            '"context": "null"', '"context": {"__enum__": true, "fqn": "antigravity:A", "name": "B"}', 1
        )

    def custom(model, graph):
        graph["nodes"][1]["inputs"][0]["arg"] = {"as_custom_obj": {"name": "x", "class_fqn": "y"}}

    edits = (size, attribute, target, method, library, file, argument, node, parameter, enum, custom)
    found = {edit.__name__: edited(records, edit) for edit in edits}
    found["sample inputs"] = {"data/sample_inputs/model.pt": evil}
    weights = json.loads(records["data/weights/model_weights_config.json"])
    weights["config"]["0.weight"]["use_pickle"] = True
    weights_config = json.dumps(weights).encode()
    found["weight"] = {
        "data/weights/model_weights_config.json": weights_config,
        "data/weights/weight_0": evil,
    }
    constants = {
        "config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    found["opaque constant"] = {
        "data/constants/model_constants_config.json": json.dumps(constants).encode(),
        "data/constants/opaque_obj_0": pickle.dumps(Runs(os.system, touch)),
    }
    found["opaque path"] = {"data/constants/model_constants_config.json": json.dumps(constants).encode()}
    found["native code"] = {"data/aotinductor/model/wrapper.so": b"\x7fELF"}
    return found


NAMES = (
    "size", "attribute", "target", "method", "library", "file", "argument", "node", "parameter", "enum", "custom",
    "sample inputs", "weight", "opaque constant", "opaque path", "native code",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_planted_code_is_refused(name, records, canary, tmp_path):
    found = attacks(records, canary)
    assert set(found) == set(NAMES)
    path = write(tmp_path / "evil.pt2", {**records, **found[name]})
    with pytest.raises(UnsafePickle) as error:
        load(path)
    assert "nothing was executed" in str(error.value)
    if name == "sample inputs":
        assert str(error.value) == (
            f"{path} holds a pickle with more than tensors in it; nothing was executed\n"
            "  hint: save it again with torch.export.save and plain tensors as example inputs"
        )
    if name == "target":
        assert str(error.value) == (
            f"{path} holds the target 'torch.os.system', which plain data does not need; nothing was executed\n"
            "  hint: if you trust where it comes from, save the model's state_dict there and use --factory"
        )


def test_planted_guards_are_never_run(records, canary, tmp_path):
    call = f"__import__('os').system('touch {canary}')"
    changes = edited(records, lambda model, graph: model.update(guards_code=[f"{call} == 0"]))
    path = write(tmp_path / "guards.pt2", {**records, **changes})
    loaded = load(path)
    capture(loaded.module).graph_module(torch.randn(2, 4))
    capture(loaded.module, ["input=float32[batch=2,4]"])
    exported, _ = read_pt2(path)
    exported.module()(torch.randn(2, 4))


def test_it_is_capturable_with_other_inputs(good):
    program = capture(load(good[0]).module, ["input=float32[batch=7,4]"])
    assert program.example[0].shape == (7, 4)
    assert program.provenance["capture_error"] == 0.0


def test_an_archive_with_training_flags_is_switched_to_eval(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    path = tmp_path / "train.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(3, 4),), strict=False), path)
    program = capture(load(path).module)
    x = torch.randn(3, 4)
    torch.testing.assert_close(program.graph_module(x), model.eval()(x))
    assert (
        "the archive was exported in train mode: dropout and batch norm are switched to eval"
        in (program.provenance["notes"])
    )


def test_a_truncated_archive(good, tmp_path):
    path = tmp_path / "short.pt2"
    path.write_bytes(good[0].read_bytes()[:2000])
    with pytest.raises(UnreadableFile) as error:
        load(path)
    assert str(error.value) == f"{path} is truncated or damaged\n  hint: copy or download it again"


def test_damaged_json(records, tmp_path):
    path = write(tmp_path / "bad.pt2", {**records, "models/model.json": b"{"})
    with pytest.raises(UnreadableFile, match="is truncated or damaged"):
        load(path)


def test_transformers_archives_pass_the_scan(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    program = capture(transformers.LlamaModel(config).eval(), ["input_ids=int64[batch=2,seq=8]"])
    shapes = tuple(
        {i: torch.export.Dim.AUTO for i, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in program.inputs
    )
    exported = torch.export.export(program.graph_module, program.example, dynamic_shapes=shapes, strict=False)
    path = tmp_path / "llama.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, path)
    again = capture(load(path).module)
    expected = program.graph_module(*program.example)
    torch.testing.assert_close(again.graph_module(*program.example), expected)
