// Vocabulary parallel on CUDA: the steps before and behind the exchange of packets, a thread for
// each row. The passes over the logits are those of kernels/cuda/logits.
#include "kernels/cuda/common/platform.cuh"
#include "kernels/shards.h"

namespace ipo_ext::cuda {
namespace {

constexpr int kThreads = 128;

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// Returns the row of this thread, or -1 for one behind the last.
__device__ __forceinline__ int64_t row_of_thread(const ShardArgs& args) {
  const int64_t row = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  return row < args.rows.logits.rows ? row : -1;
}

__global__ void __launch_bounds__(kThreads) shard_columns(const ShardArgs args) {
  const int64_t row = row_of_thread(args);
  if (row >= 0) args.columns[row] = local_column(args, row);
}

template <typename E>
__global__ void __launch_bounds__(kThreads) shard_packets(const ShardArgs args) {
  const int64_t row = row_of_thread(args);
  if (row >= 0) store_packet<E>(args, row);
}

template <typename E>
__global__ void __launch_bounds__(kThreads) shard_faults(const ShardArgs args) {
  const int64_t row = row_of_thread(args);
  if (row >= 0 && gathered_row<E>(args, row).fault) *args.rows.fault = 1;
}

template <typename E>
__global__ void __launch_bounds__(kThreads) shard_results(const ShardArgs args) {
  const int64_t row = row_of_thread(args);
  if (row >= 0) store_gathered<E>(args, row);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

const char* launch_rows(void (*kernel)(ShardArgs), const ShardArgs& args, CUstream_st* stream) {
  const int64_t rows = args.rows.logits.rows;
  if (rows == 0) return nullptr;
  return error_text(launch(kernel, (rows + kThreads - 1) / kThreads, kThreads, 0, stream, args));
}

}  // namespace

const char* local_columns(const ShardArgs& args, CUstream_st* stream) {
  return launch_rows(shard_columns, args, stream);
}

const char* store_packets(const ShardArgs& args, CUstream_st* stream) {
  return dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    return launch_rows(shard_packets<TypeOf<decltype(compute)>>, args, stream);
  });
}

const char* find_packet_faults(const ShardArgs& args, CUstream_st* stream) {
  return dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    return launch_rows(shard_faults<TypeOf<decltype(compute)>>, args, stream);
  });
}

const char* store_gathered_rows(const ShardArgs& args, CUstream_st* stream) {
  return dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    return launch_rows(shard_results<TypeOf<decltype(compute)>>, args, stream);
  });
}

}  // namespace ipo_ext::cuda
