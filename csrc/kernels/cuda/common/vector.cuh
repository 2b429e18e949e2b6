// Loads, converts and stores several neighbouring elements at once: vectors of 16 bytes where their
// dtype fills them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/common/platform.cuh"
#include "kernels/inputs.h"

namespace ipo_ext::cuda {

template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
  using Type = uint8_t;
};
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

// The words, of at most 16 bytes, that move kCount elements at once.
template <typename Stored, int kCount>
using WordFor =
    typename WordOf<(sizeof(Stored) * kCount < 16 ? sizeof(Stored) * kCount : 16)>::Type;

// The elements of a vector of 16 bytes.
template <typename Stored>
constexpr int kVectorElements = 16 / sizeof(Stored);

// Loads kCount elements from data[index], which nobody writes while the kernel runs; the address
// must be aligned to min(16, their bytes).
template <typename Stored, int kCount>
__device__ __forceinline__ void load_aligned(const void* data, int64_t index,
                                             Stored (&out)[kCount]) {
  using Word = WordFor<Stored, kCount>;
  constexpr int kWords = kCount * sizeof(Stored) / sizeof(Word);
  const Word* from = reinterpret_cast<const Word*>(static_cast<const Stored*>(data) + index);
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __ldg(from + i);
  memcpy(out, words, sizeof(out));
}

// Loads one word of data that the kernel may overwrite later: not through the read-only cache, and
// not through L1, which would keep what is read once.
template <typename Stored, int kCount>
__device__ __forceinline__ void load_mutable(const Stored* from, Stored (&out)[kCount]) {
  using Word = WordFor<Stored, kCount>;
  static_assert(sizeof(out) == sizeof(Word), "one load");
  const Word word = __ldcg(reinterpret_cast<const Word*>(from));
  memcpy(out, &word, sizeof(out));
}

// widen_all() and narrow_all() take neighbours to the compute dtype and back. Half precision goes
// by the device's own instructions, two at a time where it has them.
template <typename E, typename Stored, int kCount>
__device__ __forceinline__ void widen_all(const Stored (&from)[kCount], E (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = convert<E>(from[i]);
}
template <int kCount>
__device__ __forceinline__ void widen_all(const Float16 (&from)[kCount], float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = __half2float(__ushort_as_half(from[i].bits));
}

template <int kCount>
__device__ __forceinline__ void widen_all(const BFloat16 (&from)[kCount], float (&to)[kCount]) {
  static_assert(kCount % 2 == 0, "pairs");
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    uint32_t pair;
    memcpy(&pair, from + i, sizeof(pair));
    to[i] = __uint_as_float(pair << 16);
    to[i + 1] = __uint_as_float(pair & 0xffff0000u);
  }
}

// Returns the larger of each pair of elements of two vectors, two pairs at a time in half
// precision; a NaN loses.
template <typename Stored>
__device__ __forceinline__ uint4 max_of_each(const uint4& a, const uint4& b) {
  using Pair = std::conditional_t<
      std::is_same_v<Stored, Float16>, __half2,
      std::conditional_t<std::is_same_v<Stored, BFloat16>, __nv_bfloat162, Stored>>;
  constexpr int kPairs = sizeof(uint4) / sizeof(Pair);
  Pair left[kPairs], right[kPairs];
  memcpy(left, &a, sizeof(a));
  memcpy(right, &b, sizeof(b));
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if constexpr (sizeof(Stored) == 2) {
      left[i] = __hmax2(left[i], right[i]);
    } else {
      left[i] = max(left[i], right[i]);
    }
  }
  uint4 word;
  memcpy(&word, left, sizeof(word));
  return word;
}

// Returns the larger of each bf16 element and its counterpart in a pair; a NaN stays.
__device__ __forceinline__ uint4 max_of_each_or_nan(const uint4& word, uint32_t pair) {
  constexpr int kPairs = sizeof(uint4) / sizeof(__nv_bfloat162);
  __nv_bfloat162 elements[kPairs], other;
  memcpy(elements, &word, sizeof(word));
  memcpy(&other, &pair, sizeof(pair));
#pragma unroll
  for (__nv_bfloat162& element : elements) element = __hmax2_nan(element, other);
  uint4 raised;
  memcpy(&raised, elements, sizeof(raised));
  return raised;
}

template <typename E, typename Stored, int kCount>
__device__ __forceinline__ void narrow_all(const E (&from)[kCount], Stored (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = narrow<Stored>(from[i]);
}
template <int kCount>
__device__ __forceinline__ void narrow_all(const float (&from)[kCount], Float16 (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const __half2 pair = __floats2half2_rn(from[i], from[i + 1]);
    memcpy(to + i, &pair, sizeof(pair));
  }
}
template <int kCount>
__device__ __forceinline__ void narrow_all(const float (&from)[kCount], BFloat16 (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
    memcpy(to + i, &pair, sizeof(pair));
  }
}

// Loads tokens [index, index + kCount) of any floating dtype: in half precision the bits alone, to
// the first of out's bytes, for widen_tokens(). A kCount of 1 needs no alignment.
template <typename To, int kCount>
__device__ __forceinline__ void load_tokens_as_stored(const TokenInput& input, int64_t index,
                                                      To (&out)[kCount]) {
  if (input.dtype == DType::kFloat16 || input.dtype == DType::kBFloat16) {
    uint16_t bits[kCount];
    load_aligned(input.data, index, bits);
    memcpy(out, bits, sizeof(bits));
  } else if (input.dtype == DType::kFloat64) {
    double stored[kCount];
    load_aligned(input.data, index, stored);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = static_cast<To>(stored[i]);
  } else {
    float stored[kCount];
    load_aligned(input.data, index, stored);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = stored[i];
  }
}

template <typename Stored, typename To, int kCount>
__device__ __forceinline__ void widen_bits(To (&values)[kCount]) {
  Stored stored[kCount];
  memcpy(stored, values, sizeof(stored));
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = convert<To>(stored[i]);
}
template <typename To, int kCount>
__device__ __forceinline__ void widen_tokens(DType dtype, To (&values)[kCount]) {
  if (!is_half(dtype)) return;  // one test for most inputs
  if (dtype == DType::kFloat16) {
    widen_bits<Float16>(values);
  } else {
    widen_bits<BFloat16>(values);
  }
}

// Stores kCount neighbours to `to`, which is aligned to their bytes: one element, or a word of at
// most 16 bytes.
template <typename Stored, int kCount>
__device__ __forceinline__ void store_aligned(Stored* to, const Stored (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *to = values[0];
  } else {
    using Word = WordFor<Stored, kCount>;
    static_assert(sizeof(values) == sizeof(Word), "one vector store");
    Word word;
    memcpy(&word, values, sizeof(word));
    __stwb(reinterpret_cast<Word*>(to), word);  // a plain assignment is split into four stores
  }
}

// Returns whether vectors of 16 bytes can be loaded from an array; true of none.
IPO_HOST_DEVICE bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace ipo_ext::cuda
