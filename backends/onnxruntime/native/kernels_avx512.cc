// Compiled with -mavx512f -mavx2 -mfma -mf16c where the processor is of that family.
#include "kernels.h"

#if defined(__AVX512F__)
#include "table.h"

namespace moeify {
const Kernels* avx512_kernels() {
  static constexpr Kernels table = make_table("avx512");
  return &table;
}
}  // namespace moeify
#else
namespace moeify {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace moeify
#endif
