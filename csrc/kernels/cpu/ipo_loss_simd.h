// The instruction sets that ipo_loss_simd.cpp is compiled for, and what each offers.
#pragma once

#include "kernels/ipo_loss.h"

namespace ipo_ext::cpu {

#if defined(__x86_64__)
#define IPO_EXT_CPU_ARCHS(X) X(x86_64_v4) X(x86_64_v3) X(baseline)
#else
#define IPO_EXT_CPU_ARCHS(X) X(baseline)
#endif

// Writes the gradients of tokens [begin, end) and returns their sums.
#define IPO_EXT_DECLARE_ARCH(arch)                                                             \
  namespace arch {                                                                             \
  math::TileSums<float> piece_sums_f32(const IpoLossArgs& args,                                \
                                       const math::LossParams<float>& params, int64_t begin,   \
                                       int64_t end);                                           \
  math::TileSums<double> piece_sums_f64(const IpoLossArgs& args,                               \
                                        const math::LossParams<double>& params, int64_t begin, \
                                        int64_t end);                                          \
  }
IPO_EXT_CPU_ARCHS(IPO_EXT_DECLARE_ARCH)
#undef IPO_EXT_DECLARE_ARCH

}  // namespace ipo_ext::cpu
