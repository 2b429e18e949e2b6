// Declares what logits_simd.cpp offers, for each instruction set it is compiled for.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/logits.h"

namespace ipo_ext::cpu {

struct RowRange {
  int64_t begin, end;
};

// logits_rows runs the rows of range, with scratch for one row in the compute dtype; `after` is the
// row that this thread will take then, or no row.
#define IPO_EXT_DECLARE_ARCH(arch)                                                        \
  namespace arch {                                                                        \
  void logits_rows(const LogitsArgs& args, RowRange range, int64_t after, void* scratch); \
  }
IPO_EXT_CPU_ARCHS(IPO_EXT_DECLARE_ARCH)
#undef IPO_EXT_DECLARE_ARCH

}  // namespace ipo_ext::cpu
