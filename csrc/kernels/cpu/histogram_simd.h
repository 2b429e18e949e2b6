// Declares what histogram_simd.cpp offers, for each instruction set it is compiled for.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/histogram.h"

namespace ipo_ext::cpu {

// Tokens of a bin that were counted one after the other go into different tables, so that none
// waits for the last one's sum.
constexpr int kTables = 4;
using BinTables = uint32_t[kTables][math::kColumns];

// The name and the compute dtype of each version.
#define IPO_EXT_COUNT_BINS(X) \
  X(count_bins_f32, float)    \
  X(count_bins_f64, double)

// Each adds tokens [begin, end) to the tables; fewer than 2^32.
#define IPO_EXT_DECLARE_COUNT_BINS(name, E) \
  void name(const HistogramArgs& args, int64_t begin, int64_t end, BinTables& tables);
#define IPO_EXT_DECLARE_ARCH(arch)               \
  namespace arch {                               \
  IPO_EXT_COUNT_BINS(IPO_EXT_DECLARE_COUNT_BINS) \
  }
IPO_EXT_CPU_ARCHS(IPO_EXT_DECLARE_ARCH)
#undef IPO_EXT_DECLARE_ARCH
#undef IPO_EXT_DECLARE_COUNT_BINS

}  // namespace ipo_ext::cpu
