// SIMD vectors for the host, as wide as the instruction set that this file is compiled for. They
// are GNU vector types; intrinsics serve two conversions alone, which GCC 12 takes apart.
#pragma once

#include "math/lanes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ipo_ext::math {

#if defined(__AVX512F__)
constexpr int kSimdBytes = 64;
#elif defined(__AVX2__)
constexpr int kSimdBytes = 32;
#else
constexpr int kSimdBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kSimdBytes)));
typedef double DoubleVector __attribute__((vector_size(kSimdBytes)));
typedef float HalfFloatVector __attribute__((vector_size(kSimdBytes / 2)));
typedef int32_t Int32Vector __attribute__((vector_size(kSimdBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kSimdBytes)));
typedef uint32_t Uint32Vector __attribute__((vector_size(kSimdBytes)));
typedef uint64_t Uint64Vector __attribute__((vector_size(kSimdBytes)));

// The fp64 values of a FloatVector, in two registers: one type of twice the width would live in
// memory.
struct DoublePair {
  DoubleVector low, high;
  IPO_HOST_DEVICE DoublePair& operator+=(const DoublePair& other) {
    low += other.low;
    high += other.high;
    return *this;
  }
  friend IPO_HOST_DEVICE DoublePair operator*(const DoublePair& a, const DoublePair& b) {
    return {a.low * b.low, a.high * b.high};
  }
};

template <>
struct Lanes<FloatVector> {
  using Element = float;
  using Mask = Int32Vector;  // -1 or 0
  using Int = Int32Vector;
  using Unsigned = Uint32Vector;
  using Count = Int32Vector;
  using Wide = DoublePair;
  static IPO_HOST_DEVICE Mask and_not(Mask a, Mask b) { return a & ~b; }
  static IPO_HOST_DEVICE Count ones(Mask mask) { return -mask; }
  static IPO_HOST_DEVICE Wide widen(FloatVector value) {
    HalfFloatVector halves[2];
    memcpy(halves, &value, sizeof(value));
#if defined(__AVX512F__)
    return {(DoubleVector)_mm512_cvtps_pd((__m256)halves[0]),
            (DoubleVector)_mm512_cvtps_pd((__m256)halves[1])};
#elif defined(__AVX2__)
    return {(DoubleVector)_mm256_cvtps_pd((__m128)halves[0]),
            (DoubleVector)_mm256_cvtps_pd((__m128)halves[1])};
#else
    return {__builtin_convertvector(halves[0], DoubleVector),
            __builtin_convertvector(halves[1], DoubleVector)};
#endif
  }
};

template <>
struct Lanes<DoubleVector> {
  using Element = double;
  using Mask = Int64Vector;
  using Int = Int64Vector;
  using Unsigned = Uint64Vector;
  using Count = Int64Vector;
  using Wide = DoubleVector;
  static IPO_HOST_DEVICE Mask and_not(Mask a, Mask b) { return a & ~b; }
  static IPO_HOST_DEVICE Count ones(Mask mask) { return -mask; }
  static IPO_HOST_DEVICE Wide widen(DoubleVector value) { return value; }
};

template <typename E>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = FloatVector;
};
template <>
struct VectorOf<double> {
  using Type = DoubleVector;
};
template <typename E>
using Vector = typename VectorOf<E>::Type;

template <typename T>
constexpr int kLanesOf = sizeof(T) / sizeof(Element<T>);

// Loads booleans as a mask; any byte but 0 is true.
template <typename T>
IPO_HOST_DEVICE Mask<T> load_mask(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (kLanesOf<T> == 16) {
    return (Mask<T>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))) !=
           0;
  }
#elif defined(__AVX2__)
  if constexpr (kLanesOf<T> == 8) {
    return (Mask<T>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))) !=
           0;
  }
#endif
  typedef uint8_t Bytes __attribute__((vector_size(kLanesOf<T>)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Mask<T>) != 0;
}

}  // namespace ipo_ext::math
