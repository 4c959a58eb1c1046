"""What one call of a block costs on a CPU, from a few measured constants: shared by the runtimes, which bring the
constants.

The floor of a block is a roofline: ``max(FLOPs of the rows / peak, bytes of the experts touched / bandwidth)``. A
lowering is modelled as

    call + expert * E + touched * max(2 * w * (r + half_rows) / (peak * efficiency), bytes of w / (bandwidth * stream))
         + touched * repack * (1 - 1 / r) * bytes of w / bandwidth + passes * bytes of the rows / bandwidth

where w is the number of weights of one expert, ``touched`` the number of experts that have rows when tokens choose
evenly, and r their rows. ``half_rows`` is what a matrix costs before its first row (short tiles): with r = half_rows
half of the efficiency is reached. ``repack`` is the copying of weights in every call, which some kernels do unless an
expert has a single row. The dense FFN is the same formula with one expert that takes every token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_SLOWER = 1.02  # the model is not good to more than a few percent; below this it has nothing to say


@dataclass(frozen=True)
class Shape:
    """E experts of D -> F -> O, of which a token is sent to K."""

    num_experts: int
    d_model: int
    d_expert: int
    d_out: int
    top_k: int


@dataclass(frozen=True)
class Kernel:
    """The constants of one lowering; see the module. ``call`` and ``expert`` are seconds, ``half_rows`` rows."""

    call: float
    expert: float
    efficiency: float
    half_rows: float
    stream: float
    passes: float
    repack: float = 0.0
    expert_to_thread: bool = False  # experts are dealt out to threads, so fewer experts than threads leave some idle


@dataclass(frozen=True)
class Rates:
    """Of a machine: ``flops_per_thread`` is the rate of a large matrix product on one thread, ``bandwidth`` the bytes a
    second that all threads read from memory together.
    """

    flops_per_thread: float
    bandwidth: float


def weights_per_expert(shape: Shape, gated: bool) -> int:
    """Elements of the matrices of one expert; its FLOPs a row are twice that."""
    return shape.d_expert * (shape.d_model * (2 if gated else 1) + shape.d_out)


def touched(shape: Shape, tokens: int) -> float:
    """How many experts are expected to get a row when every token chooses ``top_k`` of them evenly."""
    return shape.num_experts * (1.0 - (1.0 - shape.top_k / shape.num_experts) ** tokens)


def dense_shape(shape: Shape, d_ff: int) -> Shape:
    """The dense FFN as one expert that takes every token."""
    return Shape(1, shape.d_model, d_ff, shape.d_out, 1)


def floor(
    shape: Shape, gated: bool, tokens: int, *, flops: float, bandwidth: float, weight_bytes: float = 4.0
) -> float:
    """Seconds below which no lowering of one call can go on a machine of ``flops`` a second and ``bandwidth``."""
    weights = weights_per_expert(shape, gated)
    compute = 2.0 * weights * tokens * shape.top_k / flops
    return max(compute, touched(shape, tokens) * weights * weight_bytes / bandwidth)


def seconds(
    kernel: Kernel,
    rates: Rates,
    shape: Shape,
    gated: bool,
    tokens: int,
    threads: int | None,
    *,
    weight_bytes: float = 4.0,
) -> float:
    """Seconds of one call of a block with ``tokens`` rows in. ``threads`` None is all cores, ``weight_bytes`` the size
    of one weight in memory.
    """
    threads = threads or os.cpu_count() or 1
    weights, used = weights_per_expert(shape, gated), touched(shape, tokens)
    rows = tokens * shape.top_k / used
    busy = min(threads, used) if kernel.expert_to_thread else threads
    compute = 2.0 * weights * (rows + kernel.half_rows) / (rates.flops_per_thread * busy * kernel.efficiency)
    stream = weights * weight_bytes / (rates.bandwidth * kernel.stream)
    row = 4.0 * (shape.d_model + shape.d_expert * (2 if gated else 1) + shape.d_out)
    moved = kernel.passes * tokens * shape.top_k * row / rates.bandwidth
    repacked = kernel.repack * (1.0 - 1.0 / rows) * weights * weight_bytes / rates.bandwidth
    return kernel.call + kernel.expert * shape.num_experts + used * (max(compute, stream) + repacked) + moved


def warning(
    sparse: float, dense: float, shape: Shape, d_ff: int, tokens: int, threads: int, rates: Rates
) -> str | None:
    """One line when a block is expected to take ``sparse`` seconds and the dense one ``dense``, fewer; else None."""
    if sparse <= dense * _SLOWER:
        return None
    return (
        f"at {tokens} {'token' if tokens == 1 else 'tokens'} the sparse block takes about {sparse / dense:.1f} x the "
        f"time of the dense one: {_reason(shape, d_ff, tokens, threads, rates)}"
    )


def _reason(shape: Shape, d_ff: int, tokens: int, threads: int, rates: Rates) -> str:
    """The largest of the causes, in a few words."""
    active, used = shape.top_k * shape.d_expert, touched(shape, tokens)
    computing = 2.0 * tokens * active / (rates.flops_per_thread * threads)
    reading = used * shape.d_expert * 4.0 / rates.bandwidth  # both per column of the model's width
    if active > d_ff and computing > reading:
        return f"a token goes through {active} hidden units, the dense block has {d_ff}"
    if used * shape.d_expert > d_ff:
        return f"the weights of {used:.0f} experts are read, {used * shape.d_expert / d_ff:.1f} x the dense ones"
    return f"{shape.num_experts} experts of {shape.d_expert} are too small to pay for their overhead"
