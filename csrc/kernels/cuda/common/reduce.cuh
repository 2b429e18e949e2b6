// Reduces any mergeable struct over a warp, then over a block: by shuffles in a fixed tree, without
// atomics, to the same bits every run.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/common/platform.cuh"

namespace ipo_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Does with every word of a struct what `shuffle` does with one. All lanes of the warp must call.
template <typename S, typename Shuffle>
__device__ __forceinline__ S shuffle_words(const S& value, const Shuffle& shuffle) {
  static_assert(sizeof(S) % sizeof(uint32_t) == 0, "a shuffle moves whole words");
  constexpr int kWords = sizeof(S) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(S));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
  S moved;
  memcpy(&moved, words, sizeof(S));
  return moved;
}

// Returns to lane i the value of lane i + delta.
template <typename S>
__device__ __forceinline__ S shuffle_down(const S& value, int delta) {
  return shuffle_words(value,
                       [=](uint32_t word) { return __shfl_down_sync(kFullWarp, word, delta); });
}

// Returns to lane i the value of lane i ^ mask.
template <typename S>
__device__ __forceinline__ S shuffle_xor(const S& value, int mask) {
  return shuffle_words(value,
                       [=](uint32_t word) { return __shfl_xor_sync(kFullWarp, word, mask); });
}

// Returns the merged value of the warp, valid in lane 0. All lanes must call.
template <typename S, typename Merge>
__device__ __forceinline__ S warp_reduce(S value, Merge merge) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2)
    value = merge(value, shuffle_down(value, delta));
  return value;
}

// Returns the merged value of the warp, valid in all lanes; merge(a, b) must be merge(b, a). All
// lanes must call.
template <typename S, typename Merge>
__device__ __forceinline__ S warp_all_reduce(S value, Merge merge) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    value = merge(value, shuffle_xor(value, mask));
  return value;
}

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

template <typename S, int kThreads>
struct BlockReduceStorage {
  S warps[kThreads / kWarpSize];
};

// Returns the merged value of the block, valid in thread 0. All threads must call; `storage` may be
// used again at once.
template <int kThreads, typename S, typename Merge>
__device__ __forceinline__ S block_reduce(S value, Merge merge,
                                          BlockReduceStorage<S, kThreads>& storage) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize,
                "whole warps, whose sums fit one warp");
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;

  value = warp_reduce(value, merge);
  if (lane == 0) storage.warps[warp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < kWarps; ++other) value = merge(value, storage.warps[other]);
  }
  __syncthreads();  // before the next use of storage
  return value;
}

}  // namespace ipo_ext::cuda
