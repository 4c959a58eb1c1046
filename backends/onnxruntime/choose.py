"""Which lowering a block gets: what fits the target, then what is expected, or was measured, to be fastest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from moeify.backends.deploy import Choice
from moeify.backends.onnxruntime import contrib, cost, kernel, portable
from moeify.backends.onnxruntime.cost import CONTRIB, KERNEL, SPLIT
from moeify.backends.onnxruntime.lowering import Choose
from moeify.backends.onnxruntime.mixture import Mixture
from moeify.errors import BadOption, Refused, UnknownName

QMOE = "com.microsoft.QMoE"
NAMES = (SPLIT, KERNEL, CONTRIB, QMOE)
# ``split`` is exact and runs everywhere: another lowering must beat it by more than the cost model's own error.
_MARGIN = 0.95

# Seconds of each of the lowerings named, for one mixture.
Measured = Callable[[Mixture, Sequence[str]], Mapping[str, float]]
Unfit = Callable[[Mixture, str], str | None]  # why a lowering cannot take a mixture


def chooser(
    target: str,
    *,
    tokens: int,
    threads: int | None,
    dtype: str,
    bits: int | None = None,
    storage: str = "",
    has_library: bool = False,
    tolerance: float,
    forced: str | None = None,
    measured: Measured | None = None,
) -> Choose:
    """The choice for each mixture on ``target`` (cpu, cuda or portable), with its reason in a few words.

    ``tokens`` are those expected in one call, ``threads`` None means all cores. A lowering whose own approximation is
    above ``tolerance`` does not fit, nor does any but ``split`` without a kernel for ``dtype``. ``bits`` asks for
    quantised experts, ``storage`` for those of ``kernel``, which is otherwise weighed only where there is its library
    (``has_library``). ``forced`` names the lowering of every block; the choice then raises Refused for a block it
    cannot express. ``measured`` replaces the cost model by times taken here. Raises UnknownName, BadOption.
    """
    if forced is not None and forced not in NAMES:
        raise UnknownName("lowering", forced, NAMES)
    if forced == QMOE and not bits:
        raise BadOption(f"{QMOE} has quantised experts, and no number of bits was given", hint="choose 8 or 4 bits")
    fused = QMOE if bits else CONTRIB

    def unfit(mixture: Mixture, name: str) -> str | None:
        if name == KERNEL:
            return kernel.unfit(mixture, target, storage)
        return _unfit(mixture, name, target, dtype, bits, tolerance)

    if forced is not None:
        return _forced(forced, fused, unfit)
    if target != "cpu":
        return _fused_where_it_fits(
            fused, unfit, "one fused kernel" if target == "cuda" else "one file for every runtime"
        )

    def choose(mixture: Mixture) -> Choice:
        wanted = QMOE if bits else KERNEL if storage else None
        if wanted is not None:
            reason = unfit(mixture, wanted)
            asked = f"{bits}-bit" if bits else storage
            return Choice(wanted, f"{asked} experts were asked for") if reason is None else Choice(SPLIT, reason)
        others = (KERNEL, CONTRIB) if has_library else (CONTRIB,)
        reasons = {name: unfit(mixture, name) for name in others}
        fitting = [name for name in others if reasons[name] is None]
        if not fitting:
            return Choice(SPLIT, "; ".join(reason for reason in reasons.values() if reason is not None))
        names = (SPLIT, *fitting)
        if measured is not None:
            return _fastest(measured(mixture, names), f"measured at {_count(tokens)}")
        size = mixture.dtype.itemsize
        expected = {
            name: cost.seconds(name, mixture.shape, mixture.gated, tokens, threads, weight_bytes=size) for name in names
        }
        return _fastest(expected, f"expected at {_count(tokens)} on {threads or os.cpu_count() or 1} threads")

    return choose


def _forced(name: str, fused: str, unfit: Unfit) -> Choose:
    def choose(mixture: Mixture) -> Choice:
        reason = None
        if name in (CONTRIB, QMOE) and name != fused:
            reason = f"{fused} is what the number of bits asks for"
        elif name != SPLIT:
            reason = unfit(mixture, name)
        if reason is not None:
            raise Refused(
                f"the {name} lowering cannot take this block: {reason}",
                where=mixture.call.block,
                hint=f"leave the choice open, or force {SPLIT}, which takes every block",
            )
        return Choice(name, "asked for")

    return choose


def _fused_where_it_fits(fused: str, unfit: Unfit, why: str) -> Choose:
    """Where there is no measured cost model: the fused kernel, because ``split`` starts a kernel or two per expert."""

    def choose(mixture: Mixture) -> Choice:
        reason = unfit(mixture, fused)
        if reason is not None:
            return Choice(SPLIT, reason)
        gap = contrib.approximation(mixture)
        return Choice(fused, f"{why}; its {mixture.activation} is off by {gap:.0e}" if gap else why)

    return choose


def _unfit(mixture: Mixture, name: str, target: str, dtype: str, bits: int | None, tolerance: float) -> str | None:
    """Why the fused operator cannot stand for this mixture, None when it can."""
    if mixture.dtype.name.lower() not in (dtype, _SHORT.get(dtype)):
        return f"its experts are {mixture.dtype.name.lower()}, and the model is {dtype}"
    if bits:
        from moeify.backends.onnxruntime import qmoe

        if target == "portable":
            return f"{QMOE} is ONNX Runtime's alone, and the file is to run elsewhere"
        return qmoe.unfit(mixture, target, bits, None)
    kernel = portable if target == "portable" else contrib
    reason = kernel.unfit(mixture, "cpu" if target == "portable" else target)
    if reason is not None:
        return reason
    error = kernel.approximation(mixture)
    if error > tolerance:
        return f"{name} computes {mixture.activation} with an error of {error:.0e}, above {tolerance:.0e}"
    return None


_SHORT = {"float32": "float"}  # ONNX calls single precision FLOAT


def _fastest(seconds: Mapping[str, float], how: str) -> Choice:
    split = seconds[SPLIT]
    best = min((name for name in seconds if name != SPLIT), key=lambda name: seconds[name])
    other = seconds[best]
    if other < _MARGIN * split:
        return Choice(best, f"{split / other:.2f} x as fast as {SPLIT}, {how}")
    if split < other:
        return Choice(SPLIT, f"{other / split:.2f} x as fast as {best}, {how}")
    return Choice(SPLIT, f"exact, and {best} gains less than {1 / _MARGIN - 1:.0%}, {how}")


def _count(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"
