// The table of the instruction set this file is compiled for. It is a constant: code that fills it would be compiled
// with the same flags, and run on processors that lack them.
#pragma once

#include "finish.h"
#include "product.h"

namespace moeify {
namespace {

template <class Weight, int R>
constexpr void fill(Kernels& kernels, Storage storage) {
  if constexpr (R > 0) {
    kernels.product[size_t(storage)][R] = product<Weight, R>;
    fill<Weight, R - 1>(kernels, storage);
  }
}

constexpr Kernels make_table(const char* name) {
  Kernels kernels = {};
  kernels.name = name;
  kernels.rows = kRows;
  fill<float, kRows>(kernels, Storage::kFloat32);
  fill<Half, kRows>(kernels, Storage::kFloat16);
  fill<Bfloat, kRows>(kernels, Storage::kBfloat16);
  fill<int8_t, kRows>(kernels, Storage::kInt8);
  kernels.hidden = hidden;
  return kernels;
}

}  // namespace
}  // namespace moeify
