// The threads that share a row, or a token's ids: on the CPU one. Those of CUDA are a warp
// (cuda/common/warp.cuh).
#pragma once

#include <cstdint>

#include "math/lanes.h"

namespace ipo_ext {

struct OneThread {
  IPO_HOST_DEVICE int64_t first() const { return 0; }
  IPO_HOST_DEVICE int64_t count() const { return 1; }
  IPO_HOST_DEVICE bool any(bool value) const { return value; }
  template <typename E>
  IPO_HOST_DEVICE E max(E value) const {
    return value;
  }
  IPO_HOST_DEVICE double sum(double value) const { return value; }
  IPO_HOST_DEVICE void sync() const {}
};

}  // namespace ipo_ext
