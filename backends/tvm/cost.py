"""What a block will cost in a library compiled by TVM for a CPU: the constants of ``backends.roofline`` for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeify.backends import roofline
from moeify.backends.roofline import Kernel, Rates, Shape, dense_shape

DENSE, FUSED = "dense", "fused"
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True)
class Constants(Rates):
    """Measured with TVM 0.27 in float32 on an x86-64 server with AVX2 and 32 MB of last-level cache, 2 threads, by
    ``python -m bench.fit_tvm``, which prints these lines for another machine. The typical error against the times they
    were fitted to is 35 %: most of them are of weights that may or may not be in the cache.
    """

    flops_per_thread: float = 5.6e10
    bandwidth: float = 2.74e10
    kernels: Mapping[str, Kernel] = field(default_factory=lambda: dict(_KERNELS))


_KERNELS: Mapping[str, Kernel] = {
    DENSE: Kernel(call=1e-06, expert=0.0, efficiency=1.0, half_rows=0.1, stream=2.0, passes=0.1),
    FUSED: Kernel(call=1e-06, expert=5.17e-07, efficiency=1.0, half_rows=3.09, stream=2.0, passes=0.1),
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
    dtype: str = "float32",
) -> float:
    """Seconds of one call of a block with ``tokens`` rows in. ``lowering`` is a key of ``constants.kernels``.

    ``threads`` None is all cores; ``dtype`` is what the experts are stored in.
    """
    kernel = constants.kernels[lowering]
    return roofline.seconds(kernel, constants, shape, gated, tokens, threads, weight_bytes=_BYTES[dtype])


def warning(
    shape: Shape,
    d_ff: int,
    gated: bool,
    tokens: int,
    threads: int | None,
    constants: Constants = MEASURED,
    *,
    dtype: str = "float32",
) -> str | None:
    """One line when the block is expected to be slower than the dense float32 block, else None."""
    sparse = seconds(FUSED, shape, gated, tokens, threads, constants, dtype=dtype)
    dense = seconds(DENSE, dense_shape(shape, d_ff), gated, tokens, threads, constants)
    return roofline.warning(sparse, dense, shape, d_ff, tokens, threads or os.cpu_count() or 1, constants)


def warning_of(block: Mapping[str, Any], tokens: int, threads: int | None, dtype: str = "float32") -> str | None:
    """``warning`` of a BlockReport as dict."""
    shape = Shape(block["experts"], block["d_model"], block["d_expert"], block["d_model"], block["top_k"])
    return warning(shape, block["d_ff"], block["gated"], tokens, threads, dtype=dtype)
