"""What a lowering will cost on the CPU: the constants of ``backends.roofline`` for ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeify.backends import roofline
from moeify.backends.roofline import Kernel, Rates, Shape, dense_shape, floor, touched, weights_per_expert

__all__ = [
    "CONTRIB", "DENSE", "KERNEL", "MEASURED", "SPLIT", "Constants", "Kernel", "Shape", "dense_seconds", "dense_shape",
    "floor", "seconds", "touched", "warning", "weights_per_expert",
]  # fmt: skip

DENSE, SPLIT, CONTRIB, KERNEL = "dense", "split", "com.microsoft.MoE", "kernel"


@dataclass(frozen=True)
class Constants(Rates):
    """Measured with ONNX Runtime 1.31.1 in float32 on an x86-64 server with AVX2 and 32 MB of last-level cache,
    2 threads, by ``python -m bench.bench_onnx --fit``, which prints these lines for another machine.

    The typical error against the times they were fitted to is 16 %. A constant alone means little: a block's weights
    may stay in the cache between calls, so ``stream`` can be above 1.
    """

    flops_per_thread: float = 6.17e10
    bandwidth: float = 2.85e10
    kernels: Mapping[str, Kernel] = field(default_factory=lambda: dict(_KERNELS))


_KERNELS: Mapping[str, Kernel] = {
    DENSE: Kernel(call=8.73e-06, expert=0.0, efficiency=1.0, half_rows=10.3, stream=0.983, passes=0.1),
    SPLIT: Kernel(call=1.56e-04, expert=5.37e-06, efficiency=1.0, half_rows=9.16, stream=1.75, passes=8.16),
    CONTRIB: Kernel(
        call=1.63e-04,
        expert=1e-07,
        efficiency=0.664,
        half_rows=2.48,
        stream=0.612,
        passes=4.74,
        repack=2.13,
        expert_to_thread=True,
    ),
    # Fitted in another run than the rest (typical error 16 %), whose rates were 6.77e10 and 1.82e10: converted.
    KERNEL: Kernel(call=1.07e-04, expert=4.63e-07, efficiency=1.0, half_rows=2.76, stream=1.0, passes=0.387),
}
MEASURED = Constants()


def seconds(
    lowering: str,
    shape: Shape,
    gated: bool,
    tokens: int,
    threads: int | None,
    constants: Constants = MEASURED,
    *,
    weight_bytes: float = 4.0,
) -> float:
    """Seconds of one call of a block with ``tokens`` rows in. ``lowering`` is a key of ``constants.kernels``.

    ``threads`` None is all cores, as in ONNX Runtime; ``weight_bytes`` is the size of one weight in memory.
    """
    kernel = constants.kernels[lowering]
    return roofline.seconds(kernel, constants, shape, gated, tokens, threads, weight_bytes=weight_bytes)


def dense_seconds(
    shape: Shape,
    d_ff: int,
    gated: bool,
    tokens: int,
    threads: int | None,
    constants: Constants = MEASURED,
    *,
    weight_bytes: float = 4.0,
) -> float:
    """Seconds of the dense FFN of hidden width ``d_ff`` that the block took the place of."""
    return seconds(DENSE, dense_shape(shape, d_ff), gated, tokens, threads, constants, weight_bytes=weight_bytes)


def warning(
    shape: Shape,
    d_ff: int,
    gated: bool,
    tokens: int,
    threads: int | None,
    constants: Constants = MEASURED,
    *,
    lowerings: Sequence[str] = (SPLIT, CONTRIB),
    weight_bytes: float = 4.0,
) -> str | None:
    """One line when even the fastest of ``lowerings`` is expected to be slower than the dense block, else None.

    ``weight_bytes`` is the size of an expert's weight in memory; the dense block is in float32.
    """
    sparse = min(
        seconds(name, shape, gated, tokens, threads, constants, weight_bytes=weight_bytes) for name in lowerings
    )
    dense = dense_seconds(shape, d_ff, gated, tokens, threads, constants)
    return roofline.warning(sparse, dense, shape, d_ff, tokens, threads or os.cpu_count() or 1, constants)
