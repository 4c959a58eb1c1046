// Compiled with -mavx2 -mfma -mf16c where the processor is of that family.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "table.h"

namespace moeify {
const Kernels* avx2_kernels() {
  static constexpr Kernels table = make_table("avx2");
  return &table;
}
}  // namespace moeify
#else
namespace moeify {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace moeify
#endif
