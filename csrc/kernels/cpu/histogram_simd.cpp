// The bins of a span of tokens on the CPU: a SIMD loop finds them, one token after the other is
// counted. Compiled once for each instruction set (IPO_EXT_CPU_ARCH names it), chosen at run time
// in histogram.cpp.
#include "kernels/cpu/histogram_simd.h"

#include "kernels/cpu/token_chunks.h"

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

using namespace ipo_ext::math;

template <typename E>
struct HistogramStaging {
  alignas(64) E trainer_logprob[kChunk];
  alignas(64) E inference_logprob[kChunk];
  alignas(64) uint8_t active[64];
};

template <typename E>
inline __attribute__((always_inline)) void count_chunk(const HistogramArgs& args, int64_t begin,
                                                       int64_t count, HistogramStaging<E>& staging,
                                                       BinTables& tables) {
  using T = Vector<E>;
  const Constant<E>& absent = kConstant<E, 0>;
  const E* trainer = stage<E>(args.trainer_logprobs, absent, begin, count, staging.trainer_logprob);
  const E* inference =
      stage<E>(args.inference_logprobs, absent, begin, count, staging.inference_logprob);
  const uint8_t* active = stage_mask<E>(args.loss_mask, begin, count, staging.active);
  for (int64_t i = 0; i < count; i += kLanes<E>) {
    const T x = load<T>(trainer + i) - load<T>(inference + i);
    const auto bins = histogram_bin<T>(x, load_mask<T>(active + i));
    for (int lane = 0; lane < kLanes<E>; ++lane) ++tables[lane % kTables][bins[lane] - kFirstBin];
  }
}

template <typename E>
inline __attribute__((always_inline)) void count_bins(const HistogramArgs& args, int64_t begin,
                                                      int64_t end, BinTables& tables) {
  HistogramStaging<E> staging;
  for (int64_t first = begin; first < end;) {
    const int64_t count = chunk_tokens<E>(end - first);
    count_chunk<E>(args, first, count, staging, tables);
    first += count;
  }
}

}  // namespace

#define IPO_EXT_DEFINE_COUNT_BINS(name, E)                                              \
  void name(const HistogramArgs& args, int64_t begin, int64_t end, BinTables& tables) { \
    count_bins<E>(args, begin, end, tables);                                            \
  }
IPO_EXT_COUNT_BINS(IPO_EXT_DEFINE_COUNT_BINS)
#undef IPO_EXT_DEFINE_COUNT_BINS

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
