// What one instruction set gives to the rest of the library: products of a few rows with one panel, and what is done
// with the sums. Each kernels_*.cc file is compiled with its own machine flags and fills one table; nothing else of the
// library may be compiled with such flags, or it would not load on an older processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeify {

constexpr size_t kColumns = 16;   // outputs of a panel
constexpr size_t kMostRows = 12;  // of a register tile, on any instruction set
constexpr size_t kLine = 64;      // bytes of a cache line

// How the weights lie in memory. bfloat16 is the upper half of a float32.
enum class Storage { kFloat32, kFloat16, kBfloat16, kInt8 };
constexpr size_t kStorages = 4;

// Names of moeify.ir.activations, in the order of kActivationNames.
enum class Activation { kIdentity, kRelu, kRelu2, kGelu, kGeluTanh, kQuickGelu, kSilu, kSigmoid, kTanh, kRelu6 };
constexpr const char* kActivationNames[] = {
    "identity", "relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu6",
};

// The rows of one register tile times some panels that lie one after another: sum[i][j] = sum_d rows[i][d] *
// weight[d][j] of each panel. One call for all: where the depth is small, a call costs a good part of a panel.
// Without `weights` the sums are written to `sums`; with them each row is added to its token's result while it is in
// registers: results[tokens[i]][j] += weights[i] * (sum[i][j] + bias[j]).
struct Product {
  const float* const* rows;  // where each row of the tile begins; `depth` values
  const char* panel;         // [depth][16]
  const float* scales;       // [ceil(depth / block)][16], of int8 alone
  size_t depth;
  size_t block;       // inputs that share a scale
  const char* ahead;  // what to fetch meanwhile, `stride` bytes further with each step of depth
  size_t stride;
  float* sums;  // [rows][16]; of several blocks also where they are added up
  const float* weights;
  const uint32_t* tokens;
  const float* bias;
  float* results;
  // How many panels; without `weights` there is one, whose sums the next would write over.
  size_t panels;
  // From one panel to the next: of `panel` and `ahead` in bytes, then of `scales`, `bias` and `results` in values.
  size_t panel_bytes;
  size_t scales_step;
  size_t bias_step;
  size_t results_step;
};

// out[i][j] = f(gate + gate_bias) * (up + up_bias), or f(up + up_bias) where gate is null.
struct Hidden {
  const float* up;    // [count][16]
  const float* gate;  // [count][16] or null
  const float* up_bias;
  const float* gate_bias;  // 16 values each
  Activation activation;
  size_t count;
  float* out;
  size_t stride;  // values from row to row of out
};

struct Kernels {
  const char* name;
  size_t rows;  // of the largest tile
  void (*product[kStorages][kMostRows + 1])(const Product&);  // by storage and number of rows, from 1
  void (*hidden)(const Hidden&);
};

// Null where the library was built for a processor of another family.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* baseline_kernels();  // NEON on 64-bit ARM, portable code elsewhere

// The fastest that this processor and its operating system can run.
const Kernels& best_kernels();

}  // namespace moeify
