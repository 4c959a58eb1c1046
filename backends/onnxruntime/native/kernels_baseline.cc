// Compiled without machine flags: runs on every processor of the family.
#include "table.h"

namespace moeify {
const Kernels* baseline_kernels() {
#if defined(__aarch64__)
  static constexpr Kernels table = make_table("neon");
#else
  static constexpr Kernels table = make_table("portable");
#endif
  return &table;
}
}  // namespace moeify
