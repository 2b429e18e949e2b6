// A gradient times a factor on the CPU: its elements in parallel, each by one thread.
#include "kernels/scale.h"

#include "kernels/cpu/scale_simd.h"

namespace ipo_ext::cpu {

void scale(const ScaleArgs& args, const ParallelFor& parallel_for) {
  static const auto elements = IPO_EXT_CHOOSE(scale_elements);
  const double factor = load_scalar(args.factor);
  if (factor == 1 && args.out == args.gradient) return;
  parallel_for(args.count, kElementsPerTask,
               [&](int64_t begin, int64_t end) { elements(args, factor, begin, end); });
}

void scale_rows(const ScaleRowsArgs& args, const ParallelFor& parallel_for) {
  static const auto elements = IPO_EXT_CHOOSE(scale_elements);
  const LogitsMatrix& rows = args.gradient;
  const ScaleArgs in_place = {rows.data, rows.dtype, rows.data, rows.dtype, 0, args.factor};
  const double factor = load_scalar(args.factor);
  if (factor == 1 && args.row_scales == nullptr) return;
  parallel_for(rows.rows, rows_per_task(rows.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = rows.offset(row);
      const double of_row = args.row_scales != nullptr ? args.row_scales[row] : 1;
      elements(in_place, factor * of_row, first, first + rows.columns);
    }
  });
}

}  // namespace ipo_ext::cpu
