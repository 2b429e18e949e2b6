// The lanes of a warp as the threads that share a row, or a token's ids.
#pragma once

#include "kernels/cuda/common/reduce.cuh"
#include "math/lanes.h"

namespace ipo_ext::cuda {

// All lanes must call what reduces, and get its result.
struct Warp {
  __device__ __forceinline__ int64_t first() const { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ int64_t count() const { return kWarpSize; }
  __device__ __forceinline__ bool any(bool value) const {
    return __any_sync(kFullWarp, value) != 0;
  }
  template <typename E>
  __device__ __forceinline__ E max(E value) const {
    return warp_all_reduce(value, [](E a, E b) { return math::larger(a, b); });
  }
  __device__ __forceinline__ double sum(double value) const {
    return warp_all_reduce(value, [](double a, double b) { return a + b; });
  }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

}  // namespace ipo_ext::cuda
