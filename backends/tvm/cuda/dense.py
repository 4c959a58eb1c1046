"""The rest of the model on CUDA: linear layers, products, attention, norms and softmax.

Products are kernels of our own. Norms and softmax are written as Relax operators in float32, which TVM's dlight rules
schedule for the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax

from moeify.backends.tvm.cuda.activations import TABLE
from moeify.backends.tvm.cuda.attention import make_scores
from moeify.backends.tvm.cuda.building import DTYPES
from moeify.backends.tvm.cuda.matmul import Dense, make_dense
from moeify.backends.tvm.emitter import Emitter, dtype_of, rows, shape_of
from moeify.backends.tvm.families import Lower
from moeify.backends.tvm.sizes import broadcast, same
from moeify.backends.tvm.types import dtype_name, tensor_type


def linear(emitter: Emitter, x: Any, weight: str, bias: str | None, activation: str = "identity") -> Any:
    """See ``families``. None for another type than float32 and float16, or weights of another type than ``x``."""
    dtype, source = dtype_of(x), emitter.weights.source
    names = [name for name in (weight, bias) if name is not None]
    if dtype not in DTYPES or activation not in TABLE or any(dtype_name(source(n).dtype) != dtype for n in names):
        return None
    outer, inner = source(weight).shape
    flat, leading = rows(emitter, x)
    spec = Dense(None, outer, inner, dtype, dtype, share=0, bias=bias is not None, activation=activation)
    total = shape_of(flat)[0]
    arrays = [emitter.weights.plain(name) for name in names]
    arrays[0] = _reshape(emitter, arrays[0], (1, outer, inner))
    a = _reshape(emitter, flat, (1, total, inner))
    y = _product(emitter, "linear", spec, [a, *arrays], (1, total, outer))
    return _reshape(emitter, y, (*leading, outer))


def matmul(emitter: Emitter, a: Any, b: Any) -> Any:
    """``a [..., M, K]`` times ``b [..., K, N]`` with float32 sums. None for vectors and for other types."""
    dtype, left, right = dtype_of(a), shape_of(a), shape_of(b)
    if dtype not in DTYPES or dtype_of(b) != dtype or len(left) < 2 or len(right) < 2:
        return None
    *outer, m, k = left
    *others, _, n = right
    share = 1
    if not others:
        share = 0
    elif not same(outer, others):
        result = broadcast(outer, others)
        if result is None:
            return None
        a = emitter.emit(relax.op.broadcast_to(a, (*result, m, k)))
        b = emitter.emit(relax.op.broadcast_to(b, (*result, k, n)))
        outer = result
    batch = _total(outer)
    spec = Dense(_fixed(m), _fixed(n), _fixed(k), dtype, dtype, by_rows=False, share=share)
    a = _reshape(emitter, a, (batch, m, k))
    b = _reshape(emitter, b, (batch if share else 1, k, n))
    return _reshape(emitter, _product(emitter, "matmul", spec, [a, b], (batch, m, n)), (*outer, m, n))


def attention(emitter: Emitter, q: Any, k: Any, v: Any, mask: Any | None, causal: bool, scale: float) -> Any:
    """``softmax(q @ k.T * scale + mask) @ v``; scores and their softmax are float32, [B, H, S, L] in memory."""
    dtype = dtype_of(q)
    (B, H, S, D), (_, G, L, _), dv = shape_of(q), shape_of(k), shape_of(v)[3]
    known = mask is None or dtype_of(mask) in (*DTYPES, "bool")
    if dtype not in DTYPES or not isinstance(H, int) or not isinstance(G, int) or not known:
        return None
    share = H // G
    spec = Dense(_fixed(S), _fixed(L), _fixed(D), dtype, "float32", share=share)
    arrays = [_reshape(emitter, q, (B * H, S, D)), _reshape(emitter, k, (B * G, L, D))]
    masked = None
    if mask is not None:
        shape = [1] * (4 - len(shape_of(mask))) + shape_of(mask)
        arrays.append(_reshape(emitter, mask, tuple(shape)))
        masked = (dtype_of(mask), tuple(_one(size) for size in shape))
    name = f"attention_scores_{spec.name}_h{H}_{'causal' if causal else 'full'}_{scale!r}_{_mask_name(masked)}"
    kernel = emitter.kernel(name, lambda: make_scores(spec, H, causal, scale, masked))
    scores = emitter.call(kernel, arrays, tensor_type((B * H, S, L), "float32"))
    weights = emitter.emit(relax.op.nn.softmax(scores, -1))
    if masked is not None:
        # A query that sees no key gives zeros, as in torch; its softmax is no number. TVM's maximum of nothing but
        # -inf is the smallest float.
        top = emitter.emit(relax.op.max(scores, -1, keepdims=True))
        unseen = emitter.emit(relax.op.less_equal(top, relax.const(np.finfo(np.float32).min)))
        weights = emitter.emit(relax.op.where(unseen, relax.const(np.float32(0)), weights))
    if dtype != "float32":
        weights = emitter.emit(relax.op.astype(weights, dtype))
    second = Dense(_fixed(S), _fixed(dv), _fixed(L), dtype, dtype, by_rows=False, share=share)
    inputs = [weights, _reshape(emitter, v, (B * G, L, dv))]
    return _reshape(emitter, _product(emitter, "matmul", second, inputs, (B * H, S, dv)), (B, H, S, dv))


def softmax(emitter: Emitter, x: Any) -> Any:
    """Over the last axis, in float32."""
    dtype = dtype_of(x)
    if dtype not in DTYPES:
        return None
    return _back(emitter, emitter.emit(relax.op.nn.softmax(_wide(emitter, x), -1)), dtype)


def layer_norm(emitter: Emitter, x: Any, weight: Any | None, bias: Any | None, eps: float) -> Any:
    """Over the last axis, in float32, the variance from differences: TVM's own loses digits where the mean is large."""
    dtype, op = dtype_of(x), relax.op
    if dtype not in DTYPES:
        return None
    wide = _wide(emitter, x)
    centred = emitter.emit(op.subtract(wide, emitter.emit(op.mean(wide, -1, True))))
    return _scaled(emitter, centred, weight, bias, eps, dtype)


def rms_norm(emitter: Emitter, x: Any, weight: Any | None, eps: float) -> Any:
    """Over the last axis, in float32."""
    dtype = dtype_of(x)
    return None if dtype not in DTYPES else _scaled(emitter, _wide(emitter, x), weight, None, eps, dtype)


def _scaled(emitter: Emitter, x: Any, weight: Any | None, bias: Any | None, eps: float, dtype: str) -> Any:
    op = relax.op
    square = emitter.emit(op.mean(emitter.emit(op.multiply(x, x)), -1, True))
    shifted = emitter.emit(op.add(square, relax.const(np.float32(eps))))
    y = emitter.emit(op.multiply(x, emitter.emit(op.rsqrt(shifted))))
    if weight is not None:
        y = emitter.emit(op.multiply(y, _wide(emitter, weight)))
    if bias is not None:
        y = emitter.emit(op.add(y, _wide(emitter, bias)))
    return _back(emitter, y, dtype)


def _product(emitter: Emitter, kind: str, spec: Dense, arrays: list[Any], shape: tuple[Any, ...]) -> Any:
    kernel = emitter.kernel(f"{kind}_{spec.name}", lambda: make_dense(spec))
    return emitter.call(kernel, arrays, tensor_type(shape, spec.out))


def _reshape(emitter: Emitter, x: Any, shape: tuple[Any, ...]) -> Any:
    return emitter.emit(relax.op.reshape(x, shape))


def _wide(emitter: Emitter, x: Any) -> Any:
    return x if dtype_of(x) == "float32" else emitter.emit(relax.op.astype(x, "float32"))


def _back(emitter: Emitter, y: Any, dtype: str) -> Any:
    return y if dtype == "float32" else emitter.emit(relax.op.astype(y, dtype))


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _mask_name(masked: tuple[str, tuple[bool, ...]] | None) -> str:
    if masked is None:
        return "unmasked"
    return f"{masked[0]}_{''.join('1' if one else 'n' for one in masked[1])}"


def _total(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


DENSE: Mapping[str, Lower] = {
    "linear": linear,
    "matmul": matmul,
    "attention": attention,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
