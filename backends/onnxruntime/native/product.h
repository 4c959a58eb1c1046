// The register tile: R rows times one panel of 16 columns, summed in registers over the whole depth.
//
// Registers: R * C sums, C registers of weights and one broadcast value, C = 16 / lanes.
//   AVX2      6 x 2 + 2 + 1 = 15 of 16. 12 fused multiply-adds, 2 loads and 6 broadcasts a step: 6 cycles of both FMA
//             ports, and the three (or two) load ports keep up.
//   AVX-512   12 x 1 + 1 of 32, the broadcast inside the multiply-add.
//   NEON      6 x 4 + 4 + 1 = 29 of 32.
//   portable  2 x 4 + 4 + 1 = 13 of the 16 registers of SSE2.
// Fewer rows have too few sums to hide a latency of 4 cycles on 2 ports, so those are kept two or four times over, for
// alternate steps of depth.
//
// Cache: a step reads 64 bytes of the panel (float32) and 4 of each row: 15 bytes a cycle from L2, which delivers twice
// that, so the panel need not fit into L1 and no product is cut along its depth. Rows are read where they lie, gathered
// by pointer. While one panel passes, the next is fetched into L2.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace moeify {
namespace {

constexpr size_t kVectors = kColumns / kLanes;  // C: registers of a panel's step
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6;
#else
constexpr int kRows = 2;
#endif
static_assert(kRows <= int(kMostRows));

constexpr int kFewestSums = 8;  // latency times ports of the multiply-add

// How many times over the sums are kept.
constexpr int copies(int rows) {
  const int sums = rows * int(kVectors);
  return sums >= kFewestSums ? 1 : 2 * sums >= kFewestSums ? 2 : 4;
}

// The steps `from` to `to` of depth, added to the sums of those before; `scales` null is 1. Returns where fetching
// ahead got to.
template <class Weight, int R>
inline const char* add_steps(const Product& p, const float* const* rows, size_t from, size_t to, const float* scales,
                             const char* ahead) {
  constexpr int U = copies(R);
  Floats sum[U][R][kVectors] = {};
  const Weight* panel = reinterpret_cast<const Weight*>(p.panel);

  const auto step = [&](size_t d, int u) __attribute__((always_inline)) {
    Floats weight[kVectors];
    for (size_t c = 0; c < kVectors; ++c) weight[c] = widened(panel + d * kColumns + c * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Floats x = all(rows[i][d]);
      for (size_t c = 0; c < kVectors; ++c) sum[u][i][c] += x * weight[c];
    }
  };

  constexpr int S = U > 2 ? U : 2;  // steps that are unrolled
  size_t d = from;
  for (; d + S <= to; d += S) {
#pragma GCC unroll 4
    for (int u = 0; u < S; ++u) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += p.stride;
      step(d + u, u % U);
    }
  }
  for (; d < to; ++d) step(d, 0);

#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    for (size_t c = 0; c < kVectors; ++c) {
      Floats value = sum[0][i][c];
      for (int u = 1; u < U; ++u) value += sum[u][i][c];
      float* const partial = p.sums + i * kColumns + c * kLanes;
      if (scales != nullptr) value *= load(scales + c * kLanes);
      if (from != 0) value += load(partial);
      if (p.weights == nullptr || to != p.depth) {
        store(partial, value);
      } else {
        float* const result = p.results + p.tokens[i] * kColumns + c * kLanes;
        store(result, load(result) + p.weights[i] * (value + load(p.bias + c * kLanes)));
      }
    }
  }
  return ahead;
}

template <class Weight, int R>
inline void one_panel(const Product& p, const float* const* rows) {
  if (p.scales == nullptr) {
    add_steps<Weight, R>(p, rows, 0, p.depth, nullptr, p.ahead);
    return;
  }
  const char* ahead = p.ahead;
  const float* scales = p.scales;
  for (size_t d = 0; d < p.depth; d += p.block, scales += kColumns) {
    const size_t end = p.depth - d < p.block ? p.depth : d + p.block;
    ahead = add_steps<Weight, R>(p, rows, d, end, scales, ahead);
  }
}

template <class Weight, int R>
void product(const Product& first) {
  const float* rows[R];
  for (int i = 0; i < R; ++i) rows[i] = first.rows[i];
  Product p = first;
  for (size_t left = p.panels; left > 0; --left) {
    one_panel<Weight, R>(p, rows);
    if (left == 1) return;  // a step further may be outside of an array
    p.panel += p.panel_bytes;
    p.ahead += p.panel_bytes;
    if (p.scales != nullptr) p.scales += p.scales_step;
    p.bias += p.bias_step;
    p.results += p.results_step;
  }
}

}  // namespace
}  // namespace moeify
