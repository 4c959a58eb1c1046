"""The ``kernel`` lowering: one ``moeify.kernels.DispatchFFN`` node a call, computed by the library of ``native/``.

The node holds dispatch, both products, the activation and the weighted sum; its experts are packed for the library when
the file is written, in float32 or in a type of fewer bytes. The file also carries the node's meaning in standard ONNX
(``kernel_function``): where the library is not loaded, any runtime computes that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime import kernel_function, kernel_pack
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.onnxruntime.kernel_function import MATRICES, Form
from moeify.backends.onnxruntime.kernel_names import DOMAIN, OP
from moeify.backends.onnxruntime.kernel_pack import COLUMNS, STORAGES, panel_count
from moeify.backends.onnxruntime.mixture import Mixture, sizes

_SINGLE = ir.DataType.FLOAT
_LARGEST_HALF = float(numpy.finfo(numpy.float16).max)
_MODELS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def lower(emit: Emitter, mixture: Mixture, *, storage: str = "", block: int = 0) -> None:
    """Replace a ``DispatchFFN``, and add its function to the model if it is not there. ``unfit`` must be None.

    ``storage`` is one of ``kernel_pack.STORAGES``, by default the model's own type; ``block`` is of int8. The operator
    computes in float32: half-precision models are cast around it.
    """
    shape, storage = mixture.shape, storage or _own_storage(mixture)
    form = Form(shape, mixture.activation, frozenset(mixture.stacked), storage, block)
    experts_TK = mixture.experts
    if mixture.call.lacking:
        # E stands for no expert. Such a slot weighs 0, so the kernel skips it whichever expert it names.
        experts_TK = emit.op("Mod", experts_TK, emit.constant(shape.num_experts), name="experts")
    packed = {role: _packed(emit, mixture, role, storage, block) for role in MATRICES if role in mixture.stacked}
    inputs = {
        "x": _single(emit, mixture.x, mixture.dtype, "rows"),
        "experts": experts_TK,
        "weights": _single(emit, mixture.weights, mixture.dtype, "weights"),
        **{role: panels for role, (panels, _) in packed.items()},
        **{f"{role}_scale": scales for role, (_, scales) in packed.items() if scales is not None},
        **{role: _single_bias(emit, mixture, role) for role in mixture.stacked if role not in MATRICES},
    }
    wanted = [inputs.get(name) for name in kernel_function.INPUTS]
    last = max(i for i, value in enumerate(wanted) if value is not None)
    y_TO = emit.op(OP, *wanted[: last + 1], domain=DOMAIN, name="kernel", **form.attributes())
    node = y_TO.producer()
    assert node is not None
    node.overload = form.name
    emit.model.functions.setdefault((DOMAIN, OP, form.name), kernel_function.function(form))
    # onnx does not know the operator
    y_TO.type, y_TO.shape = ir.TensorType(_SINGLE), mixture.node.outputs[0].shape
    if mixture.dtype != _SINGLE:
        y_TO = emit.op("Cast", y_TO, name="result", to=mixture.dtype)
    emit.commit(y_TO)


def unfit(mixture: Mixture, target: str, storage: str = "") -> str | None:
    """Why the operator cannot compute this mixture on ``target``, in one line; None when it can."""
    if target != "cpu":
        return "the kernel library is for the CPU"
    if mixture.activation not in kernel_pack.ACTIVATIONS:
        return f"the kernel has no activation {mixture.activation}"
    if mixture.dtype not in _MODELS:
        return f"the kernel computes in float32, and the experts are {mixture.dtype.name.lower()}"
    if storage == "float16" and mixture.dtype != ir.DataType.FLOAT16:
        arrays = [mixture.array(role) for role in MATRICES if role in mixture.stacked]
        largest = max(max(float(w.max()), -float(w.min())) for w in arrays)
        if largest > _LARGEST_HALF:
            return f"a weight of {largest:.3g} is too large for float16, which ends at {_LARGEST_HALF:.0f}"
    return None


def _own_storage(mixture: Mixture) -> str:
    return "float32" if mixture.dtype == _SINGLE else mixture.dtype.name.lower()


def _single(emit: Emitter, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    return value if dtype == _SINGLE else emit.op("Cast", value, name=name, to=_SINGLE)


def _single_bias(emit: Emitter, mixture: Mixture, role: str) -> ir.Value:
    value = mixture.stacked[role]
    if mixture.dtype == _SINGLE:
        return value
    return _lazy(emit, f"{value.name}.float32", _SINGLE, sizes(value), lambda: mixture.array(role).astype("float32"))


def _packed(emit: Emitter, mixture: Mixture, role: str, storage: str, block: int) -> tuple[ir.Value, ir.Value | None]:
    """The panels of one stacked matrix [E, width, depth] and, of int8, their scales; neither is made yet."""
    weight = mixture.stacked[role]
    num_experts, width, depth = sizes(weight)
    name = f"{weight.name}.{storage}" + (f".{block}" if block else "")

    def pack() -> kernel_pack.Packed:
        return kernel_pack.pack(mixture.array(role), storage, block)

    def scales() -> numpy.ndarray:
        made = pack().scales
        assert made is not None
        return made

    count, dtype = panel_count(width), ir.DataType.from_numpy(STORAGES[storage])
    panels = _lazy(emit, f"{name}.panels", dtype, (num_experts, count, depth, COLUMNS), lambda: pack().panels)
    if storage != "int8":
        return panels, None
    shape = (num_experts, count, kernel_pack.scale_count(depth, block), COLUMNS)
    return panels, _lazy(emit, f"{name}.scales", _SINGLE, shape, scales)


def _lazy(
    emit: Emitter, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], numpy.ndarray]
) -> ir.Value:
    """An initializer that is made when it is written, so that no model is held twice."""

    def tensor() -> ir.Tensor:
        return ir.Tensor(make(), dtype=dtype, name=name)

    return emit.initializer(name, ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name))
