// Which instruction set this processor and its operating system have.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace moeify {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too: it must save the wide registers.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

const Kernels& choose() {
  if (has_avx512() && avx512_kernels() != nullptr) return *avx512_kernels();
  if (has_avx2() && avx2_kernels() != nullptr) return *avx2_kernels();
  return *baseline_kernels();
}

}  // namespace

const Kernels& best_kernels() {
  // Asked once: in a virtual machine the question takes ten microseconds, since the host answers it.
  static const Kernels& best = choose();
  return best;
}

}  // namespace moeify
