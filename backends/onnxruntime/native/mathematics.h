// exp, erf, tanh and sigmoid of a vector: arithmetic and bit patterns only, no call of a library. NaN stays NaN. Errors
// relative to the exact value, held by the tests: exp 1e-7, erf 1e-7, tanh and sigmoid 1.5e-7.
//
// Methods: exp reduces by n ln 2 after Cody and Waite, with the polynomial of Cephes expf; erf has N. Juffa's two
// polynomials, odd below 0.93, else 1 - e^p(x).
#pragma once

#include "vector.h"

namespace moeify {
namespace {

inline Floats magnitude(Floats x) { return as_floats(as_bits(x) & 0x7fffffffu); }

inline Floats with_sign_of(Floats value, Floats x) { return as_floats(as_bits(value) | (as_bits(x) & 0x80000000u)); }

inline Floats clamp(Floats x, float low, float high) {
  x = x < low ? all(low) : x;
  return x > high ? all(high) : x;
}

// 2^n, n from -126 to 127.
inline Floats power_of_two(Ints n) { return reinterpret_cast<Floats>((n + 127) << 23); }

inline Floats exponential(Floats x) {
  constexpr float kRound = 12582912.0f;  // adding it leaves the nearest integer in the low bits of the sum
  x = clamp(x, -104.0f, 89.0f);          // e^x is 0 below and infinite above
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; the first product is exact
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints whole = reinterpret_cast<Ints>(as_bits(shifted) - 0x4b400000u);
  const Ints half = whole >> 1;  // in two steps: one does not reach denormals and the largest
  return p * power_of_two(half) * power_of_two(whole - half);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Odd polynomial of Cephes tanhf below 0.625, else 1 - 2 / (e^2x + 1).
inline Floats hyperbolic_tangent(Floats x) {
  const Floats z = x * x;
  Floats small = z * -5.70498872745e-3f + 2.06390887954e-2f;
  small = small * z + -5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z + -3.33332819422e-1f;
  small = small * z * x + x;
  const Floats size = magnitude(x);
  const Floats large = with_sign_of(1.0f - 2.0f / (exponential(size + size) + 1.0f), x);
  return size > 0.625f ? large : small;
}

inline Floats error_function(Floats x) {
  const Floats z = x * x;
  Floats small = z * -5.96761703e-4f + 4.99119423e-3f;
  small = small * z + -2.67681349e-2f;
  small = small * z + 1.12819925e-1f;
  small = small * z + -3.76125336e-1f;
  small = small * z + 1.28379166e-1f;
  small = small * x + x;

  // Beyond 4 the value is 1, and the polynomial would meet infinities of both signs.
  const Floats size = magnitude(x) > 4.0f ? all(4.0f) : magnitude(x);
  Floats large = size * -1.72853470e-5f + 3.83197126e-4f;
  large = large * (size * size) + (size * -3.88396438e-3f + 2.42546219e-2f);
  large = large * size + -1.06777877e-1f;
  large = large * size + -6.34846687e-1f;
  large = large * size + -1.28717512e-1f;
  large = with_sign_of(1.0f - exponential(large * size - size), x);
  return magnitude(x) > 0.927734375f ? large : small;
}

}  // namespace
}  // namespace moeify
