// Vectors of float32 as wide as the instruction set this file is compiled for, in the vector extension of GCC and
// Clang: + - * / and comparisons work on all lanes, and a * b + c becomes one fused instruction (-ffp-contract=fast).
//
// All of it has internal linkage: two files compiled for different processors must not share one copy.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace moeify {
namespace {

#if defined(__AVX512F__)
constexpr size_t kLanes = 16;
#elif defined(__AVX2__)
constexpr size_t kLanes = 8;
#else
constexpr size_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

// Types of a size of their own, so that overloads tell them apart.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline Floats load(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }

// Every lane. x - 0 is x for every x, so this is one broadcast from memory; 0 + x is not (x = -0), and costs an
// addition.
inline Floats all(float x) { return x - Floats{}; }

inline Floats as_floats(Bits bits) { return reinterpret_cast<Floats>(bits); }
inline Bits as_bits(Floats value) { return reinterpret_cast<Bits>(value); }

// Weights widened to float32 as they are loaded.
inline Floats widened(const float* from) { return load(from); }

#if defined(__AVX512F__)

inline Floats widened(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Floats widened(const Bfloat* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Floats widened(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

#elif defined(__AVX2__)

inline Floats widened(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Floats widened(const Bfloat* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Floats widened(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

#else

#if defined(__aarch64__)
inline Floats widened(const Half* from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}
#else
inline Floats widened(const Half* from) {
  const Bits half = {from[0].bits, from[1].bits, from[2].bits, from[3].bits};
  const Bits magnitude = (half & 0x7fffu) << 13;
  // The exponent's bias is 15 in one and 127 in the other: 2^112 apart, and denormals become normal by the way.
  const Bits scaled = as_bits(as_floats(magnitude) * 0x1p112f);
  const Bits infinite = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
  return as_floats(scaled | infinite | ((half & 0x8000u) << 16));
}
#endif
inline Floats widened(const Bfloat* from) {
  const Bits bits = {from[0].bits, from[1].bits, from[2].bits, from[3].bits};
  return as_floats(bits << 16);
}
inline Floats widened(const int8_t* from) {
  return Floats{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
}

#endif

}  // namespace
}  // namespace moeify
