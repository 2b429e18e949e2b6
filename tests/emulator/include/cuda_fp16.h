// __half as storage, with the conversions the kernels use; arithmetic is done in fp32.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __half {
  unsigned short __x;
};
struct __align__(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half value) {
  const unsigned sign = static_cast<unsigned>(value.__x & 0x8000u) << 16;
  const unsigned magnitude = value.__x & 0x7fffu;
  // 2^-24 is the smallest subnormal: exact in fp32.
  if (magnitude < 0x0400u) {
    const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -tiny : tiny;
  }
  const unsigned special = magnitude >= 0x7c00u ? 0x70u << 23 : 0u;  // infinity and NaN
  return __uint_as_float(sign | ((magnitude << 13) + (0x70u << 23) + special));
}

// To nearest, ties to even; every NaN becomes CUDA's canonical one.
inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  const unsigned bits = __float_as_uint(value);
  const auto sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  const float magnitude = __uint_as_float(bits & 0x7fffffffu);
  unsigned half_bits = 0;
  if (magnitude >= 65520.0f) {
    half_bits = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    // Adding 0.5 leaves 24 bits below it, the last of them 2^-24: fp32 rounds for us.
    half_bits = __float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f);
  } else {
    const unsigned m = __float_as_uint(magnitude) - (0x70u << 23);
    half_bits = (m + 0x0fffu + (m >> 13 & 1u)) >> 13;
  }
  return {static_cast<unsigned short>(sign | half_bits)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 value) {
  return {__half2float(value.x), __half2float(value.y)};
}

// The larger of each; a NaN loses.
inline __half2 __hmax2(__half2 a, __half2 b) {
  const float2 left = __half22float2(a), right = __half22float2(b);
  return __floats2half2_rn(max(left.x, right.x), max(left.y, right.y));
}
