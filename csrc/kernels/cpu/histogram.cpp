// The histogram of log-ratios on the CPU: tiles in parallel, each span counted in tables of its
// own.
#include "kernels/histogram.h"

#include "kernels/cpu/histogram_simd.h"
#include "kernels/cpu/spans.h"

namespace ipo_ext::cpu {
namespace {

constexpr int kTileLog2 = 13;

using CountBins = void (*)(const HistogramArgs&, int64_t begin, int64_t end, BinTables& tables);

CountBins best_count_bins(DType compute) {
  static const CountBins narrow = IPO_EXT_CHOOSE(count_bins_f32);
  static const CountBins wide = IPO_EXT_CHOOSE(count_bins_f64);
  return compute == DType::kFloat64 ? wide : narrow;
}

// A segment may have spans in tiles of several threads.
void add_tables(const HistogramArgs& args, int64_t segment, const BinTables& tables) {
  for (int bin = 0; bin < math::kBins; ++bin) {
    int64_t count = 0;
    for (const auto& table : tables) count += table[bin];
    if (count == 0) continue;
    int64_t* total = args.counts + bin * args.segments.count + segment;
    __atomic_fetch_add(total, count, __ATOMIC_RELAXED);
  }
}

}  // namespace

void histogram(HistogramArgs args, const ParallelFor& parallel_for) {
  args.segments.tile_log2 = kTileLog2;
  const CountBins count_bins = best_count_bins(args.compute_dtype);
  parallel_for(args.segments.num_tiles(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for_each_span(args.segments, tile, [&](int64_t segment, int64_t first, int64_t last) {
        BinTables tables = {};
        count_bins(args, first, last, tables);
        add_tables(args, segment, tables);
      });
    }
  });
}

}  // namespace ipo_ext::cpu
