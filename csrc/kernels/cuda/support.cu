// Replay of the sampler's support: kernels of a warp for each row, before and after those over
// whole rows, and what a loss measures of it.
#include "kernels/cuda/common/reduce.cuh"
#include "kernels/cuda/common/warp.cuh"
#include "kernels/support.h"

namespace ipo_ext::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowsPerBlock = kRowThreads / kWarpSize;
constexpr int kMetricThreads = 512;

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

// Returns the row of this warp, or -1 for one behind the last.
__device__ __forceinline__ int64_t row_of_warp(const SupportArgs& args) {
  const int64_t row = blockIdx.x * int64_t{kRowsPerBlock} + threadIdx.x / kWarpSize;
  return row < args.rows.logits.rows ? row : -1;
}

struct MergeCounts {
  __device__ __forceinline__ ReplayCounts operator()(ReplayCounts a, const ReplayCounts& b) const {
    for (int row = 0; row < math::replay::kNumCounts; ++row) a.rows[row] += b.rows[row];
    return a;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

template <typename E>
__global__ void __launch_bounds__(kRowThreads) support_find(const SupportArgs args) {
  const int64_t row = row_of_warp(args);
  if (row < 0) return;
  const bool fault = find_support_of_row<E>(args, row, Warp());
  if (fault && threadIdx.x % kWarpSize == 0) *args.rows.fault = 1;
}

template <typename Stored>
__global__ void __launch_bounds__(kRowThreads) support_read(const SupportArgs args) {
  const int64_t row = row_of_warp(args);
  if (row < 0) return;
  if (*args.rows.fault == 0) return read_support_of_row<Stored>(args, row, Warp());
  fill_candidates(args, row, std::numeric_limits<Compute<Stored>>::quiet_NaN(), Warp());
}

template <typename Gradient>
__global__ void __launch_bounds__(kRowThreads) support_write(const SupportArgs args) {
  const int64_t row = row_of_warp(args);
  if (row >= 0 && *args.rows.fault == 0)
    write_support_of_row<Gradient, Compute<Gradient>>(args, row, Warp());
}

// A block for each segment.
__global__ void __launch_bounds__(kMetricThreads) support_metrics(const ReplayMetricsArgs args) {
  using Storage = BlockReduceStorage<ReplayCounts, kMetricThreads>;
  Storage& storage = shared_storage<Storage>();
  const int64_t s = blockIdx.x;
  ReplayCounts counts = {};
  if (args.counts) {
    const int64_t end = args.segments.begin(s + 1);
    for (int64_t token = args.segments.begin(s) + threadIdx.x; token < end; token += kMetricThreads)
      count_token(args, token, counts);
  }
  counts = block_reduce<kMetricThreads>(counts, MergeCounts(), storage);
  if (threadIdx.x != 0) return;
  if (args.compute_dtype == DType::kFloat64) {
    store_replay_rows<double>(args, s, counts);
  } else {
    store_replay_rows<float>(args, s, counts);
  }
}

template <typename E>
__global__ void __launch_bounds__(kRowThreads) support_finite(const FiniteArgs args) {
  const int64_t index = blockIdx.x * int64_t{kRowThreads} + threadIdx.x;
  if (index < args.count) store_finite<E>(args, index);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

int64_t blocks_for(int64_t count, int64_t of_block) { return (count + of_block - 1) / of_block; }

const char* launch_rows(void (*kernel)(SupportArgs), const SupportArgs& args, CUstream_st* stream) {
  const int64_t rows = args.rows.logits.rows;
  if (rows == 0) return nullptr;
  return error_text(launch(kernel, blocks_for(rows, kRowsPerBlock), kRowThreads, 0, stream, args));
}

}  // namespace

const char* find_support(const SupportArgs& args, CUstream_st* stream) {
  return dispatch_compute(args.rows.compute_dtype, [&](auto compute) {
    return launch_rows(support_find<TypeOf<decltype(compute)>>, args, stream);
  });
}

const char* read_support(const SupportArgs& args, CUstream_st* stream) {
  return dispatch_floating(args.rows.logits.dtype, [&](auto stored) {
    return launch_rows(support_read<TypeOf<decltype(stored)>>, args, stream);
  });
}

const char* write_support(const SupportArgs& args, CUstream_st* stream) {
  return dispatch_floating(args.rows.gradient.dtype, [&](auto stored) {
    return launch_rows(support_write<TypeOf<decltype(stored)>>, args, stream);
  });
}

const char* replay_metrics(const ReplayMetricsArgs& args, CUstream_st* stream) {
  if (args.segments.count == 0) return nullptr;
  return error_text(launch(support_metrics, args.segments.count, kMetricThreads,
                           sizeof(BlockReduceStorage<ReplayCounts, kMetricThreads>), stream, args));
}

const char* finite_values(const FiniteArgs& args, CUstream_st* stream) {
  if (args.count == 0) return nullptr;
  return dispatch_compute(args.from.dtype, [&](auto compute) {
    return error_text(launch(support_finite<TypeOf<decltype(compute)>>,
                             blocks_for(args.count, kRowThreads), kRowThreads, 0, stream, args));
  });
}

}  // namespace ipo_ext::cuda
