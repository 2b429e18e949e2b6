// How kernels on the CPU use the caller's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace ipo_ext::cpu {

// Calls body(begin, end) for parts of [0, count), which may run side by side; ops/ supplies
// torch's.
using ParallelFor = std::function<void(int64_t count, int64_t grain,
                                       const std::function<void(int64_t, int64_t)>& body)>;

constexpr int64_t kElementsPerTask = 32768;  // fewer do not pay for waking a thread

inline int64_t rows_per_task(int64_t columns) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns));
}

}  // namespace ipo_ext::cpu
