// Packed weights, as kernel_pack.py lays them out: [experts][panels][depth][16], zeros behind the last output.
#pragma once

#include "kernels.h"

namespace moeify {

constexpr size_t panel_count(size_t width) { return (width + kColumns - 1) / kColumns; }

constexpr size_t bytes_of(Storage storage) {
  return storage == Storage::kFloat32 ? 4 : storage == Storage::kInt8 ? 1 : 2;
}

// One of the three matrices of all experts; `width` outputs of `depth` inputs.
struct Matrix {
  const char* panels = nullptr;
  const float* scales = nullptr;  // [experts][panels][blocks][16]
  const float* bias = nullptr;    // [experts][width], or null
  size_t width = 0;
  size_t depth = 0;
  size_t blocks = 1;
  size_t panel_bytes = 0;

  size_t count() const { return panel_count(width); }
  const char* panel(size_t expert, size_t panel) const { return panels + (expert * count() + panel) * panel_bytes; }
  const float* panel_scales(size_t expert, size_t panel) const {
    return scales == nullptr ? nullptr : scales + (expert * count() + panel) * blocks * kColumns;
  }
  // The 16 biases of a panel, in `padded` where they end before it does.
  const float* panel_bias(size_t expert, size_t panel, float* padded) const {
    const size_t first = panel * kColumns;
    if (bias != nullptr && first + kColumns <= width) return bias + expert * width + first;
    for (size_t j = 0; j < kColumns; ++j) {
      padded[j] = bias != nullptr && first + j < width ? bias[expert * width + first + j] : 0.0f;
    }
    return padded;
  }
  // Up to which panel, from `panel` on, `panel_bias` lies 16 values further with each, or is the same zeros.
  size_t bias_end(size_t panel) const {
    const size_t whole = width / kColumns;
    return bias != nullptr && panel < whole ? whole : count();
  }
};

}  // namespace moeify
