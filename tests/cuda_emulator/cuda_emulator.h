// CUDA kernels on a CPU: enough of the language for the matrix kernels that TVM writes.
//
// Each thread of a block is a fiber that runs until a barrier. Threads take turns from the first to the last or the other
// way round: what one thread reads before another has written it, for want of a barrier, shows in one of the two orders.
// A warp's matrix instructions are computed by its first lane.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(n)
#define uchar unsigned char
typedef _Float16 half;

struct Index { int x, y, z; };
static Index threadIdx, blockIdx;
struct uint4 { uint32_t x, y, z, w; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct half2 { half x, y; };
struct longlong4 { int64_t x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline half __float2half_rn(float x) { return (half)x; }
inline unsigned __pack_half2(half x, half y) {
  unsigned short a, b;
  std::memcpy(&a, &x, 2);
  std::memcpy(&b, &y, 2);
  return (unsigned)b << 16 | a;
}
template <class A, class B> auto max(A a, B b) { return a > b ? a : b; }
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }

alignas(64) static unsigned char buf_dyn_shmem_ptr[1 << 18];

namespace emulator {
struct Fiber { ucontext_t context; std::vector<char> stack; bool done; Index thread; };
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static Fiber* current;
static std::function<void()> body;
static void entry() { body(); current->done = true; swapcontext(&current->context, &scheduler); }

static void launch(int gx, int gy, int bx, int by, bool backwards, std::function<void()> kernel) {
  body = kernel;
  int threads = bx * by;
  fibers.resize(threads);
  for (int block = 0; block < gx * gy; ++block) {
    std::memset(buf_dyn_shmem_ptr, 0xff, sizeof buf_dyn_shmem_ptr);
    blockIdx = {block % gx, block / gx, 0};
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers[i];
      f.stack.resize(1 << 16);
      f.done = false;
      f.thread = {i % bx, i / bx, 0};
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      makecontext(&f.context, entry, 0);
    }
    for (bool running = true; running;) {
      int finished = 0;
      for (int n = 0; n < threads; ++n) {
        current = &fibers[backwards ? threads - 1 - n : n];
        if (current->done) abort();  // some threads wait at a barrier that others never reach
        threadIdx = current->thread;
        swapcontext(&scheduler, &current->context);
        finished += current->done;
      }
      if (finished && finished != threads) abort();
      running = finished == 0;
    }
  }
}
}  // namespace emulator

inline void __syncthreads() {
  emulator::Fiber* mine = emulator::current;
  swapcontext(&mine->context, &emulator::scheduler);
}

namespace nvcuda { namespace wmma {
struct matrix_a {}; struct matrix_b {}; struct accumulator {}; struct row_major {}; struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment { T at[16][16]; };
inline bool first_lane() { return threadIdx.x == 0; }
template <class F> void fill_fragment(F& f, float value) {
  if (!first_lane()) return;
  for (auto& row : f.at) for (auto& x : row) x = value;
}
// Pointers must be aligned to 32 bytes, and rows be a multiple of 16 bytes apart.
template <class T> void check(const T* p, unsigned stride) {
  if ((uintptr_t)p % 32 || stride * sizeof(T) % 16) abort();
}
template <class U, class T> void load_matrix_sync(fragment<U, 16, 16, 16, T, row_major>& f, const T* p, unsigned stride) {
  if (!first_lane()) return;
  check(p, stride);
  for (int i = 0; i < 16; ++i) for (int k = 0; k < 16; ++k) f.at[i][k] = p[i * stride + k];
}
template <class U, class T> void load_matrix_sync(fragment<U, 16, 16, 16, T, col_major>& f, const T* p, unsigned stride) {
  if (!first_lane()) return;
  check(p, stride);
  for (int i = 0; i < 16; ++i) for (int k = 0; k < 16; ++k) f.at[i][k] = p[k * stride + i];
}
template <class T> void store_matrix_sync(T* p, const fragment<accumulator, 16, 16, 16, T>& f, unsigned stride, layout_t) {
  if (!first_lane()) return;
  check(p, stride);
  for (int i = 0; i < 16; ++i) for (int k = 0; k < 16; ++k) p[i * stride + k] = f.at[i][k];
}
template <class D, class A, class B, class C> void mma_sync(D& d, const A& a, const B& b, const C& c) {
  if (!first_lane()) return;
  for (int i = 0; i < 16; ++i) for (int n = 0; n < 16; ++n) {
    float sum = c.at[i][n];
    for (int k = 0; k < 16; ++k) sum += (float)a.at[i][k] * (float)b.at[k][n];
    d.at[i][n] = sum;
  }
}
} }  // namespace nvcuda::wmma
