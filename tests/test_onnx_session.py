"""Sessions of the ONNX Runtime backend: values in and out, binding, profiles, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moeify.backends.onnxruntime import session as sessions
from moeify.backends.onnxruntime.model_header import read_header
from moeify.backends.onnxruntime.profiling import add_up
from moeify.backends.onnxruntime.session import Session
from moeify.errors import BadInputSpec, BadOption, RuntimeUnavailable, UnknownName, UnreadableFile, UsageError

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
WEIGHT = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)


def model(
    dtype: int = TensorProto.FLOAT, *, metadata: dict[str, str] | None = None, opset: int = 23
) -> onnx.ModelProto:
    """``y = x @ W`` and ``same = mask`` over a batch of any size; Identity for types that have no MatMul on the CPU."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["y"], name="layer.0.ffn/01.expert-1.up"),
        helper.make_node("Identity", ["mask"], ["same"], name="layer.0.ffn#1/02.sum"),
    ]
    weights = [numpy_helper.from_array(WEIGHT, "W")]
    if dtype != TensorProto.FLOAT:
        nodes[0], weights = helper.make_node("Identity", ["x"], ["y"], name="node_x"), []
    width = 3 if weights else 2
    graph = helper.make_graph(
        nodes,
        "g",
        [_info("x", dtype, ["batch", 2]), _info("mask", TensorProto.BOOL, ["batch"])],
        [_info("y", dtype, ["batch", width]), _info("same", TensorProto.BOOL, ["batch"])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(made, metadata or {})
    return made


def _info(name: str, dtype: int, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def session(**options: object) -> Session:
    return Session(model().SerializeToString(), threads=1, **options)  # type: ignore[arg-type]


X, MASK = torch.randn(4, 2), torch.tensor([True, False, True, True])


# --- values -------------------------------------------------------------------------------------------------------


def test_torch_goes_in_and_comes_out() -> None:
    y, same = session().run({"mask": MASK, "x": X})
    torch.testing.assert_close(y, X @ torch.from_numpy(WEIGHT))
    assert torch.equal(same, MASK)


def test_numpy_goes_in_and_comes_out() -> None:
    y, same = session().run([X.numpy(), MASK.numpy()])
    assert isinstance(y, numpy.ndarray)
    numpy.testing.assert_allclose(y, X.numpy() @ WEIGHT, rtol=1e-6)
    assert same.dtype == bool


def test_a_strided_and_a_training_tensor_are_taken() -> None:
    strided = torch.randn(2, 4, requires_grad=True).T
    y, _ = session().run([strided, MASK])
    torch.testing.assert_close(y, strided.detach() @ torch.from_numpy(WEIGHT))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_every_type_survives(dtype: torch.dtype) -> None:
    made = Session(model(TYPES[dtype]).SerializeToString())
    x = (X * 100).to(dtype)
    y, _ = made.run([x, MASK])
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_bfloat16_of_numpy_survives() -> None:
    x = X.numpy().astype(ml_dtypes.bfloat16)
    y, _ = Session(model(TensorProto.BFLOAT16).SerializeToString()).run([x, MASK.numpy()])
    assert y.dtype == x.dtype
    assert (y == x).all()


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_an_empty_batch_is_a_batch(dtype: int) -> None:
    x = numpy.empty((0, 2), dtype=numpy.float32 if dtype == TensorProto.FLOAT else ml_dtypes.bfloat16)
    y, _ = Session(model(dtype).SerializeToString()).run([x, numpy.empty(0, dtype=bool)])
    assert y.shape[0] == 0


def test_names_are_in_the_model_s_order() -> None:
    made = session()
    assert made.input_names == ["x", "mask"]
    assert made.output_names == ["y", "same"]


def test_no_torch_is_imported_to_serve() -> None:
    """By these modules; ``import moeify`` costs torch."""
    folder = Path(sessions.__file__).parent
    for name in ("session", "arrays", "profiling", "model_header"):
        assert "import torch" not in (folder / f"{name}.py").read_text()


# --- binding ------------------------------------------------------------------------------------------------------


def test_bound_inputs_are_read_again_at_every_run() -> None:
    x = X.clone()
    bound = session().bind([x, MASK])
    first = bound.run()[0].clone()
    x.mul_(2)
    second, _ = bound.run()
    torch.testing.assert_close(second, 2 * first)


def test_a_bound_output_is_written_in_place() -> None:
    y = torch.full((4, 3), torch.nan)
    outputs = session().bind([X, MASK], {"y": y}).run()
    assert outputs[0] is y
    torch.testing.assert_close(y, X @ torch.from_numpy(WEIGHT))
    assert torch.equal(outputs[1], MASK)


def test_bfloat16_is_bound_in_place() -> None:
    x, y = X.bfloat16(), torch.zeros(4, 2, dtype=torch.bfloat16)
    Session(model(TensorProto.BFLOAT16).SerializeToString()).bind([x, MASK], {"y": y}).run()
    assert torch.equal(x, y)


def test_numpy_binds() -> None:
    y = numpy.zeros((4, 3), dtype=numpy.float32)
    session().bind([X.numpy(), MASK.numpy()], {"y": y}).run()
    numpy.testing.assert_allclose(y, X.numpy() @ WEIGHT, rtol=1e-6)


def test_an_output_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(BadInputSpec) as error:
        session().bind([X, MASK], {"y": torch.zeros(3, 4).T})
    assert str(error.value) == "the memory for the output 'y' is not contiguous, so the runtime cannot write into it"


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(BadInputSpec) as error:
        session().bind([X, MASK], {"z": torch.zeros(4, 3)})
    assert str(error.value) == "the model has no output 'z'\n  hint: it has y, same"


# --- profiles -----------------------------------------------------------------------------------------------------


def test_a_profile_names_blocks_and_stages() -> None:
    made = session(profile=True)
    for _ in range(3):
        made.run([X, MASK])
    profile = made.profile()
    assert profile.runs == 3
    assert set(profile.blocks) == {"layer.0.ffn", "layer.0.ffn#1"}
    assert set(profile.blocks["layer.0.ffn"]) == {"experts.up"}
    assert profile.seconds == pytest.approx(sum(profile.of_blocks.values()) + sum(profile.other.values()))
    assert profile.seconds > 0
    assert made.profile() is profile


def test_profiles_add_up_experts_and_leave_other_nodes_to_their_operators() -> None:
    def node(name: str, op: str) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": 1_000_000, "args": {"op_name": op}}

    events = [node("a.b/01.expert-0.up", "Gemm"), node("a.b/02.expert-17.up", "Gemm"), node("node_MatMul_3", "MatMul")]
    fences = [{"cat": "Node", "name": "a.b/01.expert-0.up_fence_before", "dur": 7, "args": {"op_name": "Gemm"}}]
    profile = add_up(events + fences)
    assert profile.blocks == {"a.b": {"experts.up": 2.0}}
    assert profile.other == {"MatMul": 1.0}


def test_no_profile_without_asking() -> None:
    with pytest.raises(UsageError) as error:
        session().profile()
    assert str(error.value) == "this session records no profile\n  hint: Session(model, profile=True)"


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([X], "the model takes 2 inputs and was given 1\n  hint: in this order: x, mask"),
        ({"x": X, "mask": MASK, "z": X}, "the model has no input 'z'\n  hint: its inputs are x, mask"),
        ({"x": X}, "the model needs the input 'mask'\n  hint: its inputs are x, mask"),
        ([X.double(), MASK], "'x' must be of float, not of double"),
        ([torch.randn(4, 3), MASK], "'x' must have the shape [batch, 2], not [4, 3]"),
        ([torch.randn(4), MASK], "'x' must have the shape [batch, 2], not [4]"),
        ([X, MASK[:3]], "batch is 4 in 'x' and 3 in 'mask'"),
        ([X.tolist(), MASK], "'x' must be a tensor or an array, not a list"),
    ],
)
def test_inputs_that_do_not_fit(inputs: object, text: str) -> None:
    made = session()
    for call in (made.run, made.bind):
        with pytest.raises(BadInputSpec) as error:
            call(inputs)  # type: ignore[operator]
        assert str(error.value) == text


def test_a_failure_within_the_model_is_one_error() -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["W", "ids"], ["y"], name="lookup")],
        "g",
        [_info("ids", TensorProto.INT64, ["n"])],
        [_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(WEIGHT, "W")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    with pytest.raises(BadInputSpec, match=r"the model fails on these inputs: .*lookup.*out of data bounds"):
        Session(made.SerializeToString()).run([torch.tensor([9])])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it holds no graph"),
        (b"\x08", "it ends in the middle of a number"),
        (b"not an onnx file at all", "its fields are not those of a protobuf message"),
        (model().SerializeToString()[:60], "it ends in the middle of a field"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as error:
        Session(path)
    assert str(error.value) == f"{path} is not an ONNX model: {reason}\n  hint: it is damaged or of another kind"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile) as error:
        Session(tmp_path / "none.onnx")
    assert str(error.value) == f"cannot read {tmp_path / 'none.onnx'}: No such file or directory"


def test_a_damaged_graph_names_the_file(tmp_path: Path) -> None:
    made = model()
    made.graph.node[0].input[0] = "nothing"
    path = tmp_path / "damaged.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UnreadableFile, match=r"ONNX Runtime cannot load this model: .*nothing") as error:
        Session(path)
    assert error.value.where == str(path)


def test_weights_that_are_not_beside_the_file(tmp_path: Path) -> None:
    made = model()
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert Session(tmp_path / "m.onnx").run([X, MASK])
    (tmp_path / "m.data").unlink()
    with pytest.raises(UnreadableFile) as error:
        Session(tmp_path / "m.onnx")
    assert error.value.hint == "its weights lie in a file of their own, which belongs beside it"


def test_the_file_says_which_runtime_it_needs() -> None:
    assert Session(model(metadata={"moeify.needs_onnxruntime": "1.2"}).SerializeToString()).metadata
    with pytest.raises(RuntimeUnavailable, match=r"the model needs ONNX Runtime 99.1 and this is 1") as error:
        Session(model(metadata={"moeify.needs_onnxruntime": "99.1"}).SerializeToString())
    assert error.value.hint == "pip install 'onnxruntime>=99.1'"


def test_a_format_that_the_runtime_does_not_know_yet() -> None:
    made = model()
    made.ir_version = 99
    with pytest.raises(RuntimeUnavailable, match=r"cannot run this model: .*IR version"):
        Session(made.SerializeToString())


def test_an_operator_without_a_kernel_is_not_called_damage() -> None:
    made = model(TensorProto.BFLOAT16)
    made.graph.node[0].op_type = "Sin"
    with pytest.raises(RuntimeUnavailable, match=r"cannot run this model: .*Sin\(22\)") as error:
        Session(made.SerializeToString())
    assert error.value.hint == "the cpu provider has no such operator for these types"


def test_an_unknown_provider_and_unknown_options() -> None:
    with pytest.raises(UnknownName) as error:
        session(provider="cudo")
    assert str(error.value) == "there is no provider named 'cudo'\n  hint: did you mean 'cuda'?"
    with pytest.raises(BadOption) as error2:
        session(options={"threads_of_all": 3})
    assert str(error2.value) == "ONNX Runtime has no session option 'threads_of_all'"
    with pytest.raises(BadOption):
        session(options={"session.intra_op.allow_spinning": 1})


def test_options_reach_the_runtime(tmp_path: Path) -> None:
    file = tmp_path / "optimised.onnx"
    session(options={"optimized_model_filepath": str(file), "session.intra_op.allow_spinning": "0"})
    assert file.exists()


@pytest.mark.skipif(sessions.cuda_is_usable(), reason="CUDA works here")
def test_cuda_is_not_replaced_by_the_cpu() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"the CUDA provider of ONNX Runtime 1.* cannot be used here: "):
        session(provider="cuda")


@pytest.mark.skipif(sessions.cuda_is_usable(), reason="CUDA works here")
def test_asking_for_cuda_prints_nothing() -> None:
    """The runtime warns on the terminal, in colour; the error says it all."""
    code = "from moeify.backends.onnxruntime.session import cuda_is_usable as f; raise SystemExit(f())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_header_is_read_without_the_graph() -> None:
    header = read_header(model(metadata={"moeify.report": "{}", "b": "2"}, opset=21).SerializeToString())
    assert (header.ir_version, header.opsets, header.metadata) == (10, {"": 21}, {"moeify.report": "{}", "b": "2"})
