"""Expert weights in the layout that the native kernel streams: panels of 16 columns, zeros behind the last.

    panels[e, p, d, j] = weight[e, 16 p + j, d]

A panel is what one register tile of the kernel multiplies by: 16 outputs, all of their inputs, one after the other in
memory. ``native/layout.h`` is the other side of this file.

Source of method: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34 (2008); int8
is symmetric absmax quantisation with float32 scales, the weight-only form of Dettmers et al., arXiv 2208.07339.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy

from moeify.errors import BadOption, Refused, UnknownName

COLUMNS = 16  # of a panel: two AVX2 registers, one of AVX-512, four of NEON
BLOCKS = (0, 32, 64, 128, 256)  # inputs that share a scale; 0 is all of a row
# Names of ir.activations. Gated: the activation of the gate times up.
ACTIVATIONS = (
    "identity", "relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu6",
)  # fmt: skip
STORAGES = {
    "float32": numpy.dtype(numpy.float32),
    "float16": numpy.dtype(numpy.float16),
    "bfloat16": numpy.dtype(ml_dtypes.bfloat16),
    "int8": numpy.dtype(numpy.int8),
}
_HIGHEST = 127  # of a symmetric int8


@dataclass(frozen=True)
class Packed:
    """One stacked matrix [E, width, depth]: ``panels`` [E, P, depth, 16], and of int8 ``scales`` [E, P, B, 16]."""

    panels: numpy.ndarray
    scales: numpy.ndarray | None
    width: int
    block: int = 0


def pack(weight: numpy.ndarray, storage: str = "float32", block: int = 0) -> Packed:
    """Panels of ``weight`` [E, width, depth], a row an output, in a type of ``STORAGES``.

    ``block`` is the number of inputs that share a scale, for int8 alone. Raises UnknownName, BadOption, and Refused for
    a weight that float16 does not reach.
    """
    if storage not in STORAGES:
        raise UnknownName("expert storage", storage, STORAGES)
    if block not in BLOCKS or (block and storage != "int8"):
        raise BadOption(
            f"a block of {block} inputs to a scale does not fit {storage}",
            hint=f"int8 takes {', '.join(map(str, BLOCKS))}; other types have no scales",
        )
    experts, width, depth = weight.shape
    panels = numpy.empty((experts, panel_count(width), depth, COLUMNS), STORAGES[storage])
    scales = numpy.empty((experts, panels.shape[1], scale_count(depth, block), COLUMNS), numpy.float32)
    for e in range(experts):  # one at a time: a copy of one expert, not of all
        rows = _panels(weight[e].astype(numpy.float32))
        if storage == "int8":
            scales[e], rows = _quantized(rows, block)
        elif storage == "float16" and not (numpy.abs(rows) <= numpy.finfo(numpy.float16).max).all():
            raise Refused(
                f"a weight of expert {e} is {numpy.abs(rows).max():.3g}, and float16 ends at 65504",
                hint="store the experts in bfloat16 or int8",
            )
        panels[e] = rows
    return Packed(panels, scales if storage == "int8" else None, width, block)


def unpack(packed: Packed) -> numpy.ndarray:
    """The weight [E, width, depth] that the kernel computes with, in float32."""
    panels = packed.panels.astype(numpy.float32)
    if packed.scales is not None:
        panels *= _spread(packed.scales, panels.shape[2], packed.block)
    experts, count, depth, columns = panels.shape
    return panels.transpose(0, 1, 3, 2).reshape(experts, count * columns, depth)[:, : packed.width]


def panel_count(width: int) -> int:
    return -(-width // COLUMNS)


def scale_count(depth: int, block: int) -> int:
    return -(-depth // block) if block else 1


def _panels(rows: numpy.ndarray) -> numpy.ndarray:
    """[width, depth] as [P, depth, 16]."""
    width, depth = rows.shape
    padded = numpy.zeros((panel_count(width) * COLUMNS, depth), rows.dtype)
    padded[:width] = rows
    return padded.reshape(-1, COLUMNS, depth).transpose(0, 2, 1)


def _quantized(panels: numpy.ndarray, block: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Scales [P, B, 16] and integers [P, depth, 16]."""
    depth = panels.shape[1]
    starts = numpy.arange(0, depth, block or depth)
    scales = numpy.maximum.reduceat(numpy.abs(panels), starts, axis=1) / numpy.float32(_HIGHEST)
    divisor = numpy.where(scales > 0, scales, 1)
    integers = numpy.rint(panels / _spread(divisor, depth, block)).clip(-_HIGHEST, _HIGHEST)
    return scales, integers.astype(numpy.int8)


def _spread(scales: numpy.ndarray, depth: int, block: int) -> numpy.ndarray:
    """Scales [..., B, 16] as [..., depth, 16]; one of a whole row is left to broadcast."""
    return scales.repeat(block, axis=-2)[..., :depth, :] if block else scales
