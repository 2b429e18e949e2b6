// A gradient times a factor on the CPU: a loop that the compiler vectorises, compiled once for each
// instruction set (IPO_EXT_CPU_ARCH names it), chosen at run time in scale.cpp.
#include "kernels/cpu/scale_simd.h"

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

template <typename From, typename To>
inline __attribute__((always_inline)) void scale_stored(const ScaleArgs& args, double factor,
                                                        int64_t begin, int64_t end) {
  using E = Compute<From>;
  const E rounded = static_cast<E>(factor);
  const From* from = static_cast<const From*>(args.gradient);
  To* to = static_cast<To*>(args.out);
  for (int64_t i = begin; i < end; ++i) to[i] = narrow<To>(convert<E>(from[i]) * rounded);
}

}  // namespace

void scale_elements(const ScaleArgs& args, double factor, int64_t begin, int64_t end) {
  dispatch_floating(args.dtype, [&](auto from) {
    using From = TypeOf<decltype(from)>;
    dispatch_gradient<From>(args.out_dtype, [&](auto to) {
      scale_stored<From, TypeOf<decltype(to)>>(args, factor, begin, end);
    });
  });
}

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
