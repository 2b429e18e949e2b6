// __nv_bfloat16 as storage, with the conversions the kernels use; arithmetic is done in fp32.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __nv_bfloat16 {
  unsigned short __x;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.__x) << 16);
}

// To nearest, ties to even; every NaN becomes CUDA's canonical one.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  const unsigned bits = __float_as_uint(value);
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}

// The larger of each; a NaN loses.
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const float2 left = __bfloat1622float2(a), right = __bfloat1622float2(b);
  return __floats2bfloat162_rn(max(left.x, right.x), max(left.y, right.y));
}

// The larger of each; a NaN stays, as the canonical one.
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  const float2 left = __bfloat1622float2(a), right = __bfloat1622float2(b);
  const auto larger = [](float x, float y) { return x != x || y != y ? x + y : max(x, y); };
  return __floats2bfloat162_rn(larger(left.x, right.x), larger(left.y, right.y));
}
