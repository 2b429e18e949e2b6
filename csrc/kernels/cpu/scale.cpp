// A gradient times a factor on the CPU: its elements in parallel, each by one thread.
#include "kernels/scale.h"

#include "kernels/cpu/scale_simd.h"

namespace ipo_ext::cpu {
namespace {

constexpr int64_t kElementsPerTask = 32768;  // fewer do not pay for waking a thread

}  // namespace

void scale(const ScaleArgs& args, const ParallelFor& parallel_for) {
  static const auto elements = IPO_EXT_CHOOSE(scale_elements);
  const double factor = load_scalar(args.factor);
  if (factor == 1 && args.out == args.gradient) return;
  parallel_for(args.count, kElementsPerTask,
               [&](int64_t begin, int64_t end) { elements(args, factor, begin, end); });
}

}  // namespace ipo_ext::cpu
