"""The native operator in ONNX Runtime: results, errors, and the binding of the runtime's C API.

Shapes, routings, storages and activations at random, under sanitizers, are ``make test-native``'s.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moeify.backends.onnxruntime import kernel_build
from moeify.backends.onnxruntime.kernel_names import DOMAIN, OP
from moeify.backends.onnxruntime.kernel_pack import STORAGES, pack, unpack
from moeify.errors import RuntimeUnavailable

D, F, OUT, E, K = 40, 37, 29, 5, 3
INPUTS = (
    "x", "experts", "weights", "up", "gate", "down", "up_bias", "gate_bias", "down_bias", "up_scale", "gate_scale",
    "down_scale",
)  # fmt: skip
Arrays = dict[str, numpy.ndarray]


@pytest.fixture(scope="session")
def library() -> Path:
    try:
        return kernel_build.build()
    except RuntimeUnavailable as error:
        pytest.skip(f"no native kernels: {error.what}")


def arrays(gated: bool = False) -> Arrays:
    """Weights and biases by the names of the inputs."""
    draw = numpy.random.default_rng(0)
    sizes: dict[str, tuple[int, ...]] = {"up": (E, F, D), "down": (E, OUT, F), "up_bias": (E, F), "down_bias": (E, OUT)}
    if gated:
        sizes |= {"gate": (E, F, D), "gate_bias": (E, F)}
    return {name: draw.standard_normal(size, dtype=numpy.float32) * numpy.float32(0.1) for name, size in sizes.items()}


def packed(stacked: Arrays, storage: str, block: int = 0) -> tuple[Arrays, Arrays]:
    """What the operator reads, and the weights that this stands for."""
    reads, means = dict(stacked), dict(stacked)
    for role in ("up", "gate", "down"):
        if role in stacked:
            made = pack(stacked[role], storage, block)
            reads[role], means[role] = made.panels, unpack(made)
            if made.scales is not None:
                reads[f"{role}_scale"] = made.scales
    return reads, means


def session(library: Path, reads: Arrays, threads: int = 2, **attributes: Any) -> onnxruntime.InferenceSession:
    """A model of one node; what is not in ``reads`` is its input."""
    names = [name if name in reads or name in INPUTS[:3] else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    attributes = {"activation": "gelu", "d_expert": F, "d_out": OUT, **attributes}
    node = onnx.helper.make_node(OP, names, ["y"], domain=DOMAIN, **attributes)
    kinds = {"x": onnx.TensorProto.FLOAT, "experts": onnx.TensorProto.INT64, "weights": onnx.TensorProto.FLOAT}
    graph = onnx.helper.make_graph(
        [node],
        "block",
        [onnx.helper.make_tensor_value_info(name, kind, [None, None]) for name, kind in kinds.items()],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, OUT])],
        [ir.serde.serialize_tensor(ir.Tensor(array, name=name)) for name, array in reads.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(tokens: int) -> Arrays:
    draw = numpy.random.default_rng(1)
    return {
        "x": draw.standard_normal((tokens, D), dtype=numpy.float32),
        "experts": draw.integers(0, E, (tokens, K)),
        "weights": draw.random((tokens, K), dtype=numpy.float32),
    }


def plain(means: Arrays, given: Arrays) -> numpy.ndarray:
    """In float64, with SiLU."""
    wide: Mapping[str, numpy.ndarray] = {name: array.astype(numpy.float64) for name, array in means.items()}
    y = numpy.zeros((len(given["x"]), OUT))
    for token, experts in enumerate(given["experts"]):
        x = given["x"][token].astype(numpy.float64)
        for slot, e in enumerate(experts):
            hidden = wide["up"][e] @ x + wide["up_bias"][e]
            gate = wide["gate"][e] @ x + wide["gate_bias"][e] if "gate" in wide else hidden
            hidden = gate / (1 + numpy.exp(-gate)) * (hidden if "gate" in wide else 1)
            y[token] += given["weights"][token, slot] * (wide["down"][e] @ hidden + wide["down_bias"][e])
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("storage", "block"), [*((name, 0) for name in STORAGES), ("int8", 32)])
def test_is_what_float64_gives(library: Path, storage: str, block: int, gated: bool) -> None:
    reads, means = packed(arrays(gated), storage, block)
    run = session(library, reads, activation="silu", block=block)
    for tokens in (1, 60):
        given = inputs(tokens)
        (y,) = run.run(None, given)
        wanted = plain(means, given)
        # Two products of 40 terms in float32: the bar of the kernel.
        assert numpy.abs(y - wanted).max() <= 2e-6 * numpy.abs(wanted).max()


def test_no_tokens(library: Path) -> None:
    (y,) = session(library, packed(arrays(), "float32")[0]).run(None, inputs(0))
    assert y.shape == (0, OUT)


def test_threads_change_nothing(library: Path) -> None:
    reads, given = packed(arrays(), "float16")[0], inputs(1500)
    one, two = (session(library, reads, threads).run(None, given)[0] for threads in (1, 2))
    assert (one == two).all()


BAD = {
    "experts: index 5 at [1, 2] is outside 0 to 4": {"experts": numpy.array([[0, 1, 2], [3, 4, 5]])},
    "experts: index -1 at [0, 0] is outside 0 to 4": {"experts": numpy.array([[-1, 1, 2], [3, 4, 0]])},
    "experts: is [3, 3], and must be [2, 3]": {"experts": numpy.zeros((3, K), numpy.int64)},
    "x: is [2, 41], and must be [2, 40]": {"x": numpy.zeros((2, 41), numpy.float32)},
    "weights: is [2, 2], and must be [2, 3]": {"weights": numpy.zeros((2, 2), numpy.float32)},
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_an_error_that_names_it(library: Path, text: str) -> None:
    run = session(library, packed(arrays(), "float32")[0])
    with pytest.raises(Exception, match="Status Message") as error:
        run.run(None, {**inputs(2), **BAD[text]})
    assert str(error.value).endswith(f"moeify.kernels.DispatchFFN: {text}")


def _double(reads: Arrays) -> None:
    reads["up"] = reads["up"].astype(numpy.float64)


def _mixed(reads: Arrays) -> None:
    reads["down"] = reads["down"].astype(numpy.float16)


def _cut(reads: Arrays) -> None:
    reads["down"] = reads["down"][:, :1]


def _gate_bias(reads: Arrays) -> None:
    reads["gate_bias"] = reads["up_bias"]


def _no_scale(reads: Arrays) -> None:
    reads["up"] = reads["up"].astype(numpy.int8)


def _scale(reads: Arrays) -> None:
    reads["up_scale"] = numpy.ones((E, 3, 1, 16), numpy.float32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_double, "up: weights are float32, float16, bfloat16 or int8, and these have element type 11"),
        (_mixed, "down: is not of the type of up"),
        (_cut, "down: is [5, 1, 37, 16], and must be [5, 2, 37, 16]"),
        (_gate_bias, "gate_bias: given, and there is no gate"),
        (_no_scale, "up_scale: int8 weights need it"),
        (_scale, "up_scale: these weights have no scales"),
    ],
)
def test_bad_weights_are_an_error_that_names_them(library: Path, change: Any, text: str) -> None:
    reads = packed(arrays(), "float32")[0]
    change(reads)
    run = session(library, reads)
    with pytest.raises(Exception, match="Status Message") as error:
        run.run(None, inputs(2))
    assert str(error.value).endswith(f"moeify.kernels.DispatchFFN: {text}")


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        ({"activation": "swish"}, "activation: there is no swish"),
        ({"d_out": 0}, "d_expert, d_out: must be at least 1"),
        ({"block": 48}, "block: is 48; 0, 32, 64, 128 or 256 inputs share a scale"),
    ],
)
def test_bad_attributes_are_an_error_of_the_session(library: Path, attribute: dict[str, Any], text: str) -> None:
    with pytest.raises(Exception, match="DispatchFFN: ") as error:
        session(library, packed(arrays(), "float32")[0], **attribute)
    assert str(error.value).endswith(text)


def test_an_older_runtime_is_refused_with_both_versions(library: Path) -> None:
    """A runtime whose newest interface is version 1, of which one function is called."""
    said: list[bytes] = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: said.append(text) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.cast(version_text, ctypes.c_void_p).value)
    version_text = ctypes.create_string_buffer(b"1.2.0")
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p).value, ctypes.cast(get_version, ctypes.c_void_p).value
    )
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert said == [b"the kernels of moeify need ONNX Runtime 1.18 or newer, and this is 1.2.0"]


def test_only_what_is_meant_is_exported(library: Path) -> None:
    """A symbol that another library also has could be taken from there."""
    one = ctypes.CDLL(str(library))
    assert all(hasattr(one, name) for name in ("RegisterCustomOps", "moeify_isa", "moeify_sources"))
    assert not hasattr(one, "_ZN6moeify12best_kernelsEv")


class TestBuild:
    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(kernel_build, "NATIVE", tmp_path)

    def test_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        assert kernel_build.library() is None
        with pytest.raises(RuntimeUnavailable) as error:
            kernel_build.build()
        assert str(error.value) == (
            "the native kernels are not built, and there is no C++ compiler (c++, g++, clang++)\n"
            "  hint: install g++ or clang++, or name a compiler in CXX"
        )

    def test_with_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        compiler = tmp_path / "broken"
        compiler.write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        with pytest.raises(RuntimeUnavailable) as error:
            kernel_build.build()
        assert str(error.value) == (
            "the native kernels do not compile: fatal error: no such header\n"
            f"  at: {compiler}\n"
            "  hint: the kernels need GCC 9 or Clang 10"
        )
        assert kernel_build.library() is None

    def test_a_library_of_other_sources_is_not_taken(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / library.name).write_bytes(b"not a library")
        assert kernel_build.library() is None
        monkeypatch.setattr(kernel_build, "NATIVE", library.parent)
        assert kernel_build.library() == library
        monkeypatch.setattr(kernel_build, "digest", lambda: "other")
        assert kernel_build.library() is None
