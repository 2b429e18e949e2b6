// Vocabulary parallel on the CPU: rows in parallel, each by one thread.
#include "kernels/shards.h"

#include <atomic>

namespace ipo_ext::cpu {
namespace {

constexpr int64_t kWorkOfPacket = 32;  // one costs about as much as so many elements of a row

// Calls body(row) for every row.
template <typename Body>
void for_each_row(const ShardArgs& args, const ParallelFor& parallel_for, const Body& body) {
  parallel_for(args.rows.logits.rows, rows_per_task(kWorkOfPacket * args.ranks),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) body(row);
               });
}

}  // namespace

void local_columns(const ShardArgs& args, const ParallelFor& parallel_for) {
  for_each_row(args, parallel_for,
               [&](int64_t row) { args.columns[row] = local_column(args, row); });
}

void store_packets(const ShardArgs& args, const ParallelFor& parallel_for) {
  dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    for_each_row(args, parallel_for,
                 [&](int64_t row) { store_packet<TypeOf<decltype(compute)>>(args, row); });
  });
}

void find_packet_faults(const ShardArgs& args, const ParallelFor& parallel_for) {
  std::atomic<bool> fault{false};
  dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    for_each_row(args, parallel_for, [&](int64_t row) {
      if (gathered_row<TypeOf<decltype(compute)>>(args, row).fault)
        fault.store(true, std::memory_order_relaxed);
    });
  });
  if (fault) *args.rows.fault = 1;
}

void store_gathered_rows(const ShardArgs& args, const ParallelFor& parallel_for) {
  dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    for_each_row(args, parallel_for,
                 [&](int64_t row) { store_gathered<TypeOf<decltype(compute)>>(args, row); });
  });
}

}  // namespace ipo_ext::cpu
