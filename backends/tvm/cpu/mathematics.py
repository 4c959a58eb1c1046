"""Functions of one float32 that vectorise: arithmetic, comparisons and bit patterns only, no call of a library.

TVM leaves ``exp`` and its like to LLVM, which calls the C library once for each element. These are expressions of TIR:
inside a ``T.vectorized`` loop every step becomes one vector instruction. Each propagates NaN, takes infinities and
gives denormal results (``sigmoid`` is 0 there). Errors relative to the exact value, which a test holds against float64
over the whole range, are with fused multiply-add; without it they are nearly twice as large:

| function | error | method |
|---|---|---|
| ``exp`` | 1e-7 | 2^n e^r with r in +-ln(2)/2 by Cody and Waite, polynomial of Cephes ``expf`` |
| ``expm1`` | 1.3e-7 | the same polynomial without its 1 |
| ``log`` | 1e-7 | Cephes ``logf`` over [sqrt(1/2), sqrt(2)) |
| ``log1p`` | 1.3e-7 | ``log`` of the rounded sum and its rounding error (Kahan), for arguments from 0 up |
| ``tanh`` | 1.5e-7 | odd polynomial of Cephes ``tanhf`` below 0.625, else 1 - 2 / (e^2x + 1) |
| ``erf`` | 1e-7 | N. Juffa's two polynomials: odd below 0.93, else 1 - e^p(x) |
| ``sigmoid`` | 1.5e-7 | 1 / (1 + e^-x) |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; n * _LN2_HIGH is exact for |n| < 2^14
_LOWEST, _HIGHEST = -104.0, 89.0  # e^x is 0 below and infinite above, in float32
# Adding it rounds a float32 of less than 2^22 to an integer, which is then in the low bits of the sum.
_ROUND, _ROUND_BITS = 12582912.0, 0x4B400000
_SQRT_HALF_BITS = 0x3F3504F3
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERF_SMALL = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
_ERF_LARGE = (
    -1.72853470e-5,
    3.83197126e-4,
    -3.88396438e-3,
    2.42546219e-2,
    -1.06777877e-1,
    -6.34846687e-1,
    -1.28717512e-1,
)

Expr = Any
Function = Callable[[Any], Any]


def constant(value: float) -> Expr:
    return tirx.const(value, "float32")


def let(value: Expr, body: Function) -> Expr:
    """``body`` of a variable that has this value: computed once, however often the body names it."""
    name = tirx.Var("v", value.ty)
    return tirx.Let(name, value, body(name))


def select(condition: Expr, true: Expr, false: Expr) -> Expr:
    """Both are computed. A comparison with NaN is false."""
    return tirx.Select(condition, true, false)


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """By Horner's rule, from the highest power down."""
    value = constant(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + constant(coefficient)
    return value


def absolute(x: Expr) -> Expr:
    return _float(_bits(x) & tirx.const(0x7FFFFFFF, "int32"))


def with_sign_of(value: Expr, x: Expr) -> Expr:
    """``value``, which is not negative, negative where ``x`` is."""
    return _float(_bits(value) | (_bits(x) & tirx.const(-(2**31), "int32")))


def clamp(x: Expr, low: float, high: float) -> Expr:
    """``x`` within the limits; NaN stays NaN: of two unordered values the second is taken."""
    return tirx.Max(constant(low), tirx.Min(constant(high), x))


def exp(x: Expr) -> Expr:
    def scaled(n: Expr, r: Expr) -> Expr:
        value = polynomial(r, _EXP) * (r * r) + r + constant(1)
        half = n >> tirx.const(1, "int32")  # 2^n in two steps: one does not reach denormals and the largest
        return value * _power_of_two(half) * _power_of_two(n - half)

    return let(x, lambda x: let(clamp(x, _LOWEST, _HIGHEST), lambda x: _reduced(x, scaled)))


def expm1(x: Expr) -> Expr:
    """``e^x - 1`` without cancellation near 0."""

    def scaled(n: Expr, r: Expr) -> Expr:
        below_one = polynomial(r, _EXP) * (r * r) + r
        return let(
            # Half of 2^n: all of it overflows before the result does.
            _power_of_two(n - tirx.const(1, "int32")),
            lambda half: (below_one * half + (half - constant(0.5))) * constant(2),
        )

    return let(x, lambda x: let(clamp(x, -20.0, _HIGHEST), lambda x: _reduced(x, scaled)))


def log(x: Expr) -> Expr:
    """Natural; -inf at 0, NaN below it."""
    scale = 2.0**23

    def of(x: Expr) -> Expr:
        tiny = x < constant(2.0**-126)
        normal = select(tiny, x * constant(scale), x)
        value = let(normal, lambda y: _log_of_normal(y, select(tiny, constant(-23), constant(0))))
        infinite = select(x < constant(0), constant(float("nan")), constant(float("-inf")))
        value = select(x > constant(0), value, infinite)
        # Infinity and NaN are what they were.
        return select(absolute(x) < constant(float("inf")), value, select(x < constant(0), constant(float("nan")), x))

    return let(x, of)


def log1p(x: Expr) -> Expr:
    """``log(1 + x)`` for x >= 0 (NaN, infinity included) without losing the bits that ``1 + x`` rounds away."""

    def of(x: Expr, y: Expr) -> Expr:
        value = _log_of_normal(y, constant(0)) + (x - (y - constant(1))) / y
        return select(x < constant(float("inf")), value, x)

    return let(x, lambda x: let(x + constant(1), lambda y: of(x, y)))


def tanh(x: Expr) -> Expr:
    def of(x: Expr, size: Expr) -> Expr:
        small = let(x * x, lambda z: polynomial(z, _TANH) * z * x + x)
        large = with_sign_of(constant(1) - constant(2) / (exp(size + size) + constant(1)), x)
        # Not "size < limit": a NaN must take the polynomial, where it stays one.
        return select(size > constant(0.625), large, small)

    return let(x, lambda x: let(absolute(x), lambda size: of(x, size)))


def erf(x: Expr) -> Expr:
    def large(size: Expr, z: Expr) -> Expr:
        even = let(z, lambda z: polynomial(size, _ERF_LARGE[0:2]) * z + polynomial(size, _ERF_LARGE[2:4]))
        return constant(1) - exp(polynomial_from(even, size, _ERF_LARGE[4:]) * size - size)

    def of(x: Expr, size: Expr) -> Expr:
        z = x * x
        small = let(z, lambda z: polynomial(z, _ERF_SMALL)) * x + x
        # Beyond 4 the value is 1, and the polynomial would meet infinities of both signs.
        bounded = let(select(size > constant(4), constant(4), size), lambda s: large(s, s * s))
        return select(size > constant(0.927734375), with_sign_of(bounded, x), small)

    return let(x, lambda x: let(absolute(x), lambda size: of(x, size)))


def sigmoid(x: Expr) -> Expr:
    return constant(1) / (constant(1) + exp(constant(0) - x))


def polynomial_from(first: Expr, x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's rule with a computed highest coefficient."""
    value = first
    for coefficient in coefficients:
        value = value * x + constant(coefficient)
    return value


def _reduced(x: Expr, body: Callable[[Any, Any], Any]) -> Expr:
    """``body(n, r)`` with x = n ln 2 + r."""

    def of(shifted: Expr) -> Expr:
        n = _bits(shifted) - tirx.const(_ROUND_BITS, "int32")
        return let(
            shifted - constant(_ROUND),
            lambda f: let(x - f * constant(_LN2_HIGH) - f * constant(_LN2_LOW), lambda r: let(n, lambda n: body(n, r))),
        )

    return let(x * constant(_LOG2E) + constant(_ROUND), of)


def _log_of_normal(x: Expr, more: Expr) -> Expr:
    """``log(x) + more * ln 2`` of a positive normal number."""

    def of(e: Expr, f: Expr, z: Expr) -> Expr:
        value = polynomial(f, _LOG) * f * z + e * constant(_LN2_LOW) - z * constant(0.5)
        return f + value + e * constant(_LN2_HIGH)

    shift = tirx.const(23, "int32")
    return let(
        (_bits(x) - tirx.const(_SQRT_HALF_BITS, "int32")) >> shift,
        lambda i: let(
            tirx.Cast("float32", i) + more,
            lambda e: let(_float(_bits(x) - (i << shift)) - constant(1), lambda f: let(f * f, lambda z: of(e, f, z))),
        ),
    )


def _power_of_two(n: Expr) -> Expr:
    """2^n of an int32 from -126 to 127."""
    return _float((n + tirx.const(127, "int32")) << tirx.const(23, "int32"))


def _bits(x: Expr) -> Expr:
    return tirx.reinterpret("int32", x)


def _float(bits: Expr) -> Expr:
    return tirx.reinterpret("float32", bits)
