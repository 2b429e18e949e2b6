// What ipo_loss_simd.cpp offers, for each instruction set it is compiled for.
#pragma once

#include "kernels/cpu/instruction_sets.h"
#include "kernels/ipo_loss.h"

namespace ipo_ext::cpu {

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
