// Replay of the sampler's support on the CPU: rows in parallel, each by one thread.
#include "kernels/support.h"

#include <atomic>

namespace ipo_ext::cpu {
namespace {

constexpr int64_t kWorkOfId = 16;  // an id costs about as much as so many elements of a row

// Calls body(row) for every row.
template <typename Body>
void for_each_row(const SupportArgs& args, const ParallelFor& parallel_for, const Body& body) {
  parallel_for(args.rows.logits.rows, rows_per_task(kWorkOfId * args.width),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) body(row);
               });
}

}  // namespace

void find_support(const SupportArgs& args, const ParallelFor& parallel_for) {
  std::atomic<bool> fault{false};
  dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    using E = TypeOf<decltype(compute)>;
    for_each_row(args, parallel_for, [&](int64_t row) {
      if (find_support_of_row<E>(args, row, OneThread()))
        fault.store(true, std::memory_order_relaxed);
    });
  });
  if (fault) *args.rows.fault = 1;
}

void read_support(const SupportArgs& args, const ParallelFor& parallel_for) {
  dispatch_floating(args.rows.logits.dtype, [&](auto stored) {
    using Stored = TypeOf<decltype(stored)>;
    for_each_row(args, parallel_for,
                 [&](int64_t row) { read_support_of_row<Stored>(args, row, OneThread()); });
  });
}

void write_support(const SupportArgs& args, const ParallelFor& parallel_for) {
  dispatch_floating(args.rows.gradient.dtype, [&](auto stored) {
    using Gradient = TypeOf<decltype(stored)>;
    for_each_row(args, parallel_for, [&](int64_t row) {
      write_support_of_row<Gradient, Compute<Gradient>>(args, row, OneThread());
    });
  });
}

void replay_metrics(const ReplayMetricsArgs& args) {
  for (int64_t s = 0; s < args.segments.count; ++s) {
    ReplayCounts counts = {};
    if (args.counts) {
      for (int64_t token = args.segments.begin(s); token < args.segments.begin(s + 1); ++token)
        count_token(args, token, counts);
    }
    dispatch_compute(args.compute_dtype, [&](auto compute) {
      store_replay_rows<TypeOf<decltype(compute)>>(args, s, counts);
    });
  }
}

void finite_values(const FiniteArgs& args) {
  dispatch_compute(args.from.dtype, [&](auto compute) {
    for (int64_t i = 0; i < args.count; ++i) store_finite<TypeOf<decltype(compute)>>(args, i);
  });
}

}  // namespace ipo_ext::cpu
