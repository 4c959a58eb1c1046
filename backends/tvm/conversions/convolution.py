"""Convolutions: those that are linear layers by the target's kernel of these, the others by Relax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.matrices import by_name
from moeify.backends.tvm.conversions.movement import permuted
from moeify.backends.tvm.conversions.slices import sliced
from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import shape_of

_aten = torch.ops.aten
_op = relax.op
_OPS = {1: _op.nn.conv1d, 2: _op.nn.conv2d, 3: _op.nn.conv3d}
_TURNED = {1: _op.nn.conv1d_transpose, 2: _op.nn.conv2d_transpose, 3: _op.nn.conv3d_transpose}
_LAYOUTS = {1: ("NCW", "OIW", "IOW"), 2: ("NCHW", "OIHW", "IOHW"), 3: ("NCDHW", "OIDHW", "IODHW")}


def _convolution(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value, weight, bias = args["input"].meta["val"], args["weight"], args["bias"]
    rank = weight.meta["val"].dim() - 2
    x = t.tensor(args["input"])
    if value.dim() == rank + 1:
        x = t.reshape(x, [1, *shape_of(x)])  # without a batch
    stride, dilation = (_each(args[name], rank) for name in ("stride", "dilation"))
    turned = bool(args.get("transposed", node.target in _TRANSPOSED))
    kernel = [int(size) for size in weight.meta["val"].shape[2:]]
    padding = _padding(args["padding"], kernel, dilation)
    plain = not turned and args["groups"] == 1 and not any(map(any, padding)) and set(dilation) == {1}
    if plain and stride == kernel and t.name(weight) is not None:
        result = _patches(t, node, x, weight, bias, kernel)
    else:
        edges = [before for before, _ in padding] + [after for _, after in padding]
        names = _LAYOUTS[rank]
        options = {"strides": stride, "padding": edges, "dilation": dilation, "groups": args["groups"]}
        options["data_layout"] = names[0]
        kernels = t.tensor(weight)
        if turned:
            more = _each(args["output_padding"], rank)
            call = _TURNED[rank](x, kernels, kernel_layout=names[2], output_padding=more, **options)
        else:
            call = _OPS[rank](x, kernels, kernel_layout=names[1], **options)
        result = t.emit(call)
        if bias is not None:
            channels = [1, shape_of(result)[1], *[1] * rank]
            result = t.emit(_op.add(result, t.reshape(t.tensor(bias), channels)))
    return t.reshape(result, t.shape(node)) if value.dim() == rank + 1 else result


def _patches(t: Translation, node: fx.Node, x: Any, weight: fx.Node, bias: Any, kernel: Sequence[int]) -> Any:
    """Kernels that lie side by side, of one element too: rows of their elements through a linear layer."""
    rank = len(kernel)
    batch, channels = shape_of(x)[:2]
    counts = t.shape(node)[-rank:]
    for axis, (count, width) in enumerate(zip(counts, kernel)):  # what does not fill a patch is not read
        x = sliced(t, x, axis + 2, 0, t.symbols.simplify(count * width))
    apart = [batch, channels, *(size for pair in zip(counts, kernel) for size in pair)]
    order = [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)]
    inputs = channels
    for width in kernel:
        inputs *= width
    rows = t.reshape(permuted(t, t.reshape(x, apart), order), [batch, *counts, inputs])
    name = t.constants.derive(weight, "rows", lambda w: w.flatten(1))
    result = by_name(t, None, rows, name, bias)
    return permuted(t, result, [0, rank + 1, *range(1, rank + 1)])


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Before and after each axis. "same" puts the odd element at the end."""
    if value == "valid":
        return [(0, 0)] * len(kernel)
    if value == "same":
        totals = [(width - 1) * step for width, step in zip(kernel, dilation)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(width, width) for width in _each(value, len(kernel))]


def _average_pool(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    if args["divisor_override"] is not None or args["self"].meta["val"].dim() != 4:
        return NotImplemented
    window = _each(args["kernel_size"], 2)
    return t.emit(
        _op.nn.avg_pool2d(
            t.tensor(args["self"]),
            pool_size=window,
            strides=_each(args["stride"], 2) if args["stride"] else window,
            padding=_each(args["padding"], 2) * 2,
            ceil_mode=bool(args["ceil_mode"]),
            count_include_pad=bool(args["count_include_pad"]),
        )
    )


_TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)

TABLE: dict[Any, Convert] = {
    **dict.fromkeys(
        (
            _aten.conv1d.default,
            _aten.conv1d.padding,
            _aten.conv2d.default,
            _aten.conv2d.padding,
            _aten.conv3d.default,
            _aten.conv3d.padding,
            _aten.convolution.default,
            *_TRANSPOSED,
        ),
        _convolution,
    ),
    _aten.avg_pool2d.default: _average_pool,
}
