// How kernels on the CPU use the caller's threads.
#pragma once

#include <cstdint>
#include <functional>

namespace ipo_ext::cpu {

// Calls body(begin, end) for parts of [0, count), which may run side by side; ops/ supplies
// torch's.
using ParallelFor = std::function<void(int64_t count, int64_t grain,
                                       const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace ipo_ext::cpu
