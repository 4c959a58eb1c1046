// From the sums of a tile, while they are in L1, to hidden values: bias, activation, gate.
#pragma once

#include "kernels.h"
#include "mathematics.h"

namespace moeify {
namespace {

template <Activation A>
inline Floats activated(Floats u) {
  if constexpr (A == Activation::kRelu) return u < 0.0f ? Floats{} : u;  // this way round NaN stays NaN
  if constexpr (A == Activation::kRelu2) {
    const Floats positive = u < 0.0f ? Floats{} : u;
    return positive * positive;
  }
  if constexpr (A == Activation::kGelu) return 0.5f * u * (1.0f + error_function(u * 0.70710678f));
  // 0.5 u (1 + tanh z) is u sigmoid(2 z); z = sqrt(2 / pi) (u + 0.044715 u^3).
  if constexpr (A == Activation::kGeluTanh) return u * sigmoid(u * (u * u * 0.0713548163f + 1.59576912f));
  if constexpr (A == Activation::kQuickGelu) return u * sigmoid(1.702f * u);
  if constexpr (A == Activation::kSilu) return u * sigmoid(u);
  if constexpr (A == Activation::kSigmoid) return sigmoid(u);
  if constexpr (A == Activation::kTanh) return hyperbolic_tangent(u);
  if constexpr (A == Activation::kRelu6) return clamp(u, 0.0f, 6.0f);
  return u;
}

template <Activation A>
void hidden_values(const Hidden& h) {
  for (size_t i = 0; i < h.count; ++i) {
    for (size_t j = 0; j < kColumns; j += kLanes) {
      const Floats up = load(h.up + i * kColumns + j) + load(h.up_bias + j);
      Floats value;
      if (h.gate == nullptr) {
        value = activated<A>(up);
      } else {
        value = activated<A>(load(h.gate + i * kColumns + j) + load(h.gate_bias + j)) * up;
      }
      store(h.out + i * h.stride + j, value);
    }
  }
}

void hidden(const Hidden& h) {
  switch (h.activation) {
    case Activation::kIdentity: return hidden_values<Activation::kIdentity>(h);
    case Activation::kRelu: return hidden_values<Activation::kRelu>(h);
    case Activation::kRelu2: return hidden_values<Activation::kRelu2>(h);
    case Activation::kGelu: return hidden_values<Activation::kGelu>(h);
    case Activation::kGeluTanh: return hidden_values<Activation::kGeluTanh>(h);
    case Activation::kQuickGelu: return hidden_values<Activation::kQuickGelu>(h);
    case Activation::kSilu: return hidden_values<Activation::kSilu>(h);
    case Activation::kSigmoid: return hidden_values<Activation::kSigmoid>(h);
    case Activation::kTanh: return hidden_values<Activation::kTanh>(h);
    case Activation::kRelu6: return hidden_values<Activation::kRelu6>(h);
  }
}

}  // namespace
}  // namespace moeify
