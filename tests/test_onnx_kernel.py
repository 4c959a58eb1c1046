"""The kernel lowering: one file; ONNX Runtime with the library runs the kernel, any runtime the function's body."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import onnx
import onnx.compose
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from moeify.backends.deploy import Choice
from moeify.backends.onnxruntime import kernel, kernel_build, kernel_library, kernel_pack, split
from moeify.backends.onnxruntime import session as sessions
from moeify.backends.onnxruntime.backend import OnnxRuntime
from moeify.backends.onnxruntime.kernel_names import DOMAIN, OP, VERSION
from moeify.backends.onnxruntime.lowering import lower
from moeify.backends.onnxruntime.session import Session
from moeify.errors import BadInputSpec, RuntimeUnavailable
from tests.onnx_mixtures import Case, arrays, find, proto, relative

# Of max abs: a sum of some dozen rounded products in float32; then what one rounding of every weight costs (11 bits, 8
# bits, and 127 steps to the largest of a row), about averaged out over a sum.
CLOSE = 1e-6
STORED = {"float32": CLOSE, "float16": 1e-3, "bfloat16": 8e-3, "int8": 2e-2}
CASES = [
    Case("gelu", F=20, D=24),  # no width fills its last panel
    Case("silu", gated=True, bias=False, E=3, K=1, F=40, O=8),
    Case("relu2", bias="down_bias", E=1, K=1),
    Case("quick_gelu", gated=True, bias="up_bias", K=3),
]


def one(case: Case) -> str:
    return f"{case.activation}-{case.E}"


def file(case: Case, storage: str = "", block: int = 0) -> onnx.ModelProto:
    return proto(case.lowered(functools.partial(kernel.lower, storage=storage, block=block)))


def outputs(model: onnx.ModelProto, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    session = Session(model.SerializeToString(), threads=1, **options)
    return -session.run(inputs | {"x": -inputs["x"]})[0]


def body(model: onnx.ModelProto, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What onnx.reference computes, which has no operator of the name. It has Gelu, but in no function."""
    flat = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    assert DOMAIN not in {node.domain for node in flat.graph.node}
    return -torch.from_numpy(ReferenceEvaluator(flat).run(None, arrays(inputs, negated="x"))[0])


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("case", CASES, ids=one)
def test_the_body_computes_the_mixture(case: Case, storage: str) -> None:
    model, inputs = file(case, storage), case.inputs()
    expected = case.expected(**inputs)
    assert relative(outputs(model, inputs, use_kernels=False), expected) < STORED[storage]
    assert relative(body(model, inputs), expected) < STORED[storage]


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("case", CASES, ids=one)
def test_the_kernel_computes_what_the_body_computes(case: Case, storage: str, kernel_library: Path) -> None:
    model, inputs = file(case, storage), case.inputs()
    with_kernel, without = (outputs(model, inputs, use_kernels=use) for use in (True, False))
    assert relative(with_kernel, without.double()) < CLOSE  # the same weights, rounded once


def test_blocks_of_int8(kernel_library: Path) -> None:
    case = Case("gelu", F=40, D=80)  # a block and a half, and more
    model, inputs = file(case, "int8", block=32), case.inputs()
    assert relative(outputs(model, inputs), case.expected(**inputs)) < STORED["int8"]
    assert relative(body(model, inputs), outputs(model, inputs).double()) < CLOSE


@pytest.mark.parametrize("use", [True, False])
def test_which_of_the_two_runs(use: bool, kernel_library: Path) -> None:
    case = Case("silu")
    session = Session(file(case).SerializeToString(), threads=1, use_kernels=use, profile=True)
    session.run(case.inputs())
    path = session._session.end_profiling()
    ran = {event["args"]["op_name"] for event in json.loads(Path(path).read_text()) if event.get("cat") == "Node"}
    assert (OP in ran, "Gemm" in ran) == (use, not use)
    assert not ran & {"Transpose"}  # of the body's unpacking, which is folded away at loading
    assert session.kernels is not None
    assert (session.kernels.library == kernel_library) == use


def test_a_plain_runtime_loads_the_library_in_one_line(kernel_library: Path) -> None:
    case = Case("silu")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(kernel_library))
    session = onnxruntime.InferenceSession(file(case).SerializeToString(), options)
    inputs = case.inputs()
    y = -torch.from_numpy(session.run(None, arrays(inputs, negated="x"))[0])
    assert relative(y, case.expected(**inputs)) < CLOSE


@pytest.mark.parametrize("use", [True, False])
def test_slots_without_an_expert(use: bool, kernel_library: Path) -> None:
    case = Case("gelu", bias=True)
    source = case.neutral()
    source.calls = [dataclasses.replace(source.calls[0], lacking=True)]
    model = proto(lower(source, lambda mixture: Choice("one", "a test"), {"one": kernel.lower}).model)
    inputs = case.inputs()
    inputs["experts"][:2, 1] = case.E
    inputs["weights"][:2, 1] = 0
    there = inputs["experts"].clamp(max=case.E - 1)
    result = outputs(model, inputs, use_kernels=use)
    assert relative(result, case.expected(**(inputs | {"experts": there}))) < CLOSE


@pytest.mark.parametrize("storage", ["", "int8"])
def test_a_half_precision_model_is_cast_around_it(storage: str, kernel_library: Path) -> None:
    case = Case("silu", gated=True, dtype=torch.float16)
    model, inputs = file(case, storage), case.inputs()
    panels = next(t for t in model.graph.initializer if t.name.endswith("panels"))
    assert panels.data_type == {"": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[storage]
    result = outputs(model, inputs)
    assert result.dtype == torch.float16
    assert relative(result, case.expected(**inputs)) < (STORED[storage] if storage else 1e-3)  # 11 bits of x and y


@pytest.mark.parametrize("use", [True, False])
def test_no_tokens(use: bool, kernel_library: Path) -> None:
    case = Case("gelu")
    assert outputs(file(case), case.inputs(0), use_kernels=use).shape == (0, case.D)


@pytest.mark.parametrize("use", [True, False])
def test_two_forms_in_one_model(use: bool, kernel_library: Path) -> None:
    """``b(a(x))``, both on the same experts and weights."""
    first, second = Case("relu", F=8), Case("silu", F=24, gated=True)
    late = onnx.compose.add_prefix(file(second), "late.")
    merged = onnx.compose.merge_models(file(first), late, io_map=[("y", "late.x")])
    assert len({f.overload for f in merged.functions}) == 2
    inputs = first.inputs()
    session = Session(merged.SerializeToString(), threads=1, use_kernels=use)
    given = inputs | {f"late.{name}": inputs[name] for name in ("experts", "weights")}
    # Each model is -f(-x).
    middle = -first.expected(**(inputs | {"x": -inputs["x"]}))
    expected = -second.expected(**(inputs | {"x": -middle}))
    assert relative(session.run(given)[0], expected) < 2 * CLOSE


def test_forms_have_functions_of_their_own() -> None:
    names = {
        node.overload
        for case in CASES
        for storage, block in (("float32", 0), ("int8", 0), ("int8", 32))
        for node in [find(case.lowered(functools.partial(kernel.lower, storage=storage, block=block)), OP)]
    }
    assert len(names) == 3 * len(CASES)
    assert "4x24x20x24.top2.gelu.int8-32.up_bias.down_bias" in names


def test_what_it_cannot_express() -> None:
    assert kernel.unfit(Case("mish").mixture(), "cpu") == "the kernel has no activation mish"
    assert kernel.unfit(Case(dtype=torch.float64).mixture(), "cpu") == (
        "the kernel computes in float32, and the experts are double"
    )
    assert kernel.unfit(Case().mixture(), "portable") == "the kernel library is for the CPU"
    assert kernel.unfit(Case().mixture(), "cpu") is None


def test_weights_beyond_float16_do_not_fit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = Case().stacked()
    stacked["down"][2, 0, 0] = -1e6
    monkeypatch.setattr(Case, "stacked", lambda self: stacked)
    mixture = Case().mixture()
    assert kernel.unfit(mixture, "cpu", "float16") == "a weight of 1e+06 is too large for float16, which ends at 65504"
    assert kernel.unfit(mixture, "cpu", "bfloat16") is None


def test_an_index_out_of_range_is_named(kernel_library: Path) -> None:
    case = Case()
    inputs = case.inputs()
    inputs["experts"][3, 1] = 9
    with pytest.raises(BadInputSpec, match=r"experts: index 9 at \[3, 1\] is outside 0 to 3"):
        outputs(file(case), inputs)


def test_a_session_says_what_runs(kernel_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = file(Case()).SerializeToString()
    assert str(Session(model).kernels) == f"the fused kernel ({kernel_build.isa()})"
    monkeypatch.setattr(kernel_build, "isa", lambda: "portable")
    assert str(Session(model).kernels) == "the fused kernel in portable C++, which is slower: this CPU has no AVX2"
    monkeypatch.setattr(kernel_build, "library", lambda: None)
    monkeypatch.setattr(kernel_build, "reason", lambda: "there is no compiler")
    assert str(Session(model).kernels) == "standard operators, not the fused kernel: there is no compiler"
    assert Session(proto(Case().lowered(split.lower)).SerializeToString()).kernels is None


@pytest.mark.parametrize(
    ("dtype", "experts", "precision"),
    [
        ("float32", "int8", "int8"),
        ("float16", "float32", "float16"),
        ("float16", "int8", "int8"),
        ("float16", "int8-64", "int8"),
        ("float16", "", "float16"),
    ],
)
def test_the_fewest_digits_decide_what_error_is_expected(dtype: str, experts: str, precision: str) -> None:
    assert OnnxRuntime(dtype=dtype, expert_dtype=experts).precision == precision


def test_a_model_of_another_version_is_refused_with_both() -> None:
    model = file(Case())
    next(one for one in model.opset_import if one.domain == DOMAIN).version = 7
    with pytest.raises(RuntimeUnavailable, match=f"version 7 of {DOMAIN}, and this moeify has version {VERSION}"):
        Session(model.SerializeToString())


def test_a_library_that_the_runtime_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(sessions, "kernels", lambda *_: kernel_library.Kernels(broken, "avx2"))
    with pytest.raises(RuntimeUnavailable, match="cannot load the kernel library") as caught:
        Session(file(Case()).SerializeToString())
    assert caught.value.where == str(broken)


def test_the_sizes_are_known_before_the_weights_are_made() -> None:
    """The lazy initializers promise shapes that the packer keeps."""
    case = Case("gelu", F=20, D=40)
    model = case.lowered(functools.partial(kernel.lower, storage="int8", block=32))
    stacked = case.stacked()
    for role in ("up", "down"):
        packed = kernel_pack.pack(stacked[role].numpy(), "int8", 32)
        assert packed.scales is not None
        values = model.graph.initializers
        assert tuple(values[f"experts.{role}.int8.32.panels"].shape) == packed.panels.shape
        assert tuple(values[f"experts.{role}.int8.32.scales"].shape) == packed.scales.shape
