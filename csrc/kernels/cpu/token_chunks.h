// Stages neighbouring tokens for the SIMD loops over them (ipo_loss_simd.cpp, sequence_simd.cpp):
// in the compute dtype and padded to whole vectors, so that ragged tails run the same vector code.
// All of it is inlined, as the math is (math/lanes.h).
#pragma once

#include <type_traits>

#include "kernels/cpu/simd_memory.h"
#include "kernels/inputs.h"

namespace ipo_ext::cpu {

using math::kLanesOf;
using math::Vector;

constexpr int64_t kChunk = 1024;  // tokens staged at once; a multiple of every vector's lanes

// What stands for an absent tensor.
template <typename E>
struct Constant {
  alignas(64) E values[kChunk];
  constexpr explicit Constant(E value) : values() {
    for (E& each : values) each = value;
  }
};
template <typename E, int kValue>
constexpr Constant<E> kConstant(kValue);

template <typename E>
constexpr int64_t kLanes = kLanesOf<Vector<E>>;

template <typename E>
inline __attribute__((always_inline)) bool is_ragged(int64_t count) {
  return count % kLanes<E> != 0;
}

// Returns the tokens of the next chunk: as many whole vectors as there are, then the ragged tail.
template <typename E>
inline __attribute__((always_inline)) int64_t chunk_tokens(int64_t left) {
  if (left >= kChunk) return kChunk;
  return left < kLanes<E> ? left : left - left % kLanes<E>;
}

template <typename E, typename Stored>
inline __attribute__((always_inline)) void convert_tokens(const void* data, int64_t begin,
                                                          int64_t count, E* out) {
  const Stored* tokens = static_cast<const Stored*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = convert<E>(tokens[i]);
  for (int64_t i = count; i < count + kLanes<E> && is_ragged<E>(i); ++i) out[i] = 0;
}

// Returns tokens [begin, begin + count) as E, padded to whole vectors.
template <typename E>
inline __attribute__((always_inline)) const E* stage(TokenInput input, const Constant<E>& absent,
                                                     int64_t begin, int64_t count, E* staged) {
  if (input.data == nullptr) return absent.values;
  return dispatch_floating(input.dtype, [&](auto stored) -> const E* {
    using Stored = TypeOf<decltype(stored)>;
    if constexpr (std::is_same_v<Stored, E>) {
      if (!is_ragged<E>(count)) return static_cast<const E*>(input.data) + begin;
    }
    convert_tokens<E, Stored>(input.data, begin, count, staged);
    return staged;
  });
}

// The same of the loss mask.
template <typename E>
inline __attribute__((always_inline)) const uint8_t* stage_mask(const uint8_t* mask, int64_t begin,
                                                                int64_t count, uint8_t* staged) {
  if (!is_ragged<E>(count)) return mask + begin;
  for (int64_t i = 0; i < kLanes<E>; ++i) staged[i] = i < count && mask[begin + i] != 0;
  return staged;
}

}  // namespace ipo_ext::cpu
