// Declares what scale_simd.cpp offers, for each instruction set it is compiled for.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/scale.h"

namespace ipo_ext::cpu {

// scale_elements writes elements [begin, end) of the gradient, times factor, to out.
#define IPO_EXT_DECLARE_ARCH(arch)                                                       \
  namespace arch {                                                                       \
  void scale_elements(const ScaleArgs& args, double factor, int64_t begin, int64_t end); \
  }
IPO_EXT_CPU_ARCHS(IPO_EXT_DECLARE_ARCH)
#undef IPO_EXT_DECLARE_ARCH

}  // namespace ipo_ext::cpu
