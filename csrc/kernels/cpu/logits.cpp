// Rows of logits on the CPU: in parallel, each by one thread, so that the result does not depend on
// the number of threads.
#include "kernels/logits.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "kernels/cpu/logits_simd.h"

namespace ipo_ext::cpu {
namespace {

// Deals out batches of a few rows to whoever comes first: inactive rows cost nothing, and masks
// come in runs, so equal numbers of rows would not be equal work.
class RowBatches {
 public:
  RowBatches(int64_t rows, int64_t size) : rows_(rows), size_(size) {}

  // Returns the next batch, which is empty after the last row.
  RowRange next() {
    const int64_t begin = std::min(next_.fetch_add(size_, std::memory_order_relaxed), rows_);
    return {begin, std::min(begin + size_, rows_)};
  }
  // Returns the next batch while there are enough for every thread to get one.
  RowRange next_of_many(int64_t threads) {
    if (next_.load(std::memory_order_relaxed) + threads * size_ > rows_) return {rows_, rows_};
    return next();
  }

 private:
  const int64_t rows_, size_;
  std::atomic<int64_t> next_{0};
};

int64_t scratch_bytes(const LogitsArgs& args) {
  const int64_t element = args.compute_dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return args.logits.columns * element;
}

}  // namespace

void logits(const LogitsArgs& args, const ParallelFor& parallel_for) {
  static const auto rows = IPO_EXT_CHOOSE(logits_rows);
  const int64_t batch_rows = rows_per_task(args.logits.columns);
  RowBatches batches(args.logits.rows, batch_rows);
  parallel_for(args.logits.rows, batch_rows, [&](int64_t begin, int64_t end) {
    const int64_t threads = (args.logits.rows + end - begin - 1) / (end - begin);
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes(args)]);
    for (RowRange range = batches.next(); range.begin < range.end;) {
      const RowRange after = batches.next_of_many(threads);  // early: it is prefetched
      rows(args, range, after.begin, scratch.get());
      range = after.begin < after.end ? after : batches.next();
    }
  });
}

}  // namespace ipo_ext::cpu
