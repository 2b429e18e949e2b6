// The histogram of log-ratios: a block for each tile of tokens, which counts them in shared memory.
#include "kernels/cuda/common/reduce.cuh"
#include "kernels/cuda/common/vector.cuh"
#include "kernels/histogram.h"

namespace ipo_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileSize = 16 * kThreads;
constexpr int64_t kMostSpans = 16;  // that a block counts one by one; of more, token by token

// A table for each warp, so that fewer tokens meet.
struct BinStorage {
  unsigned tables[kWarps][math::kColumns];
};

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void add_to_segment(const HistogramArgs& args, int column,
                                               int64_t segment, unsigned count) {
  auto* total = reinterpret_cast<unsigned long long*>(args.counts);
  atomicAdd(total + column * args.segments.count + segment, static_cast<unsigned long long>(count));
}

// All threads of the block must call.
__device__ __forceinline__ void clear(BinStorage& storage) {
  unsigned* counts = &storage.tables[0][0];
  for (int i = threadIdx.x; i < kWarps * math::kColumns; i += kThreads) counts[i] = 0;
  __syncthreads();
}

// All threads of the block must call.
__device__ __forceinline__ void add_tables(const HistogramArgs& args, int64_t segment,
                                           const BinStorage& storage) {
  __syncthreads();
  if (threadIdx.x >= math::kBins) return;
  unsigned count = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) count += storage.tables[warp][threadIdx.x];
  if (count > 0) add_to_segment(args, threadIdx.x, segment, count);
}

// The log-ratios of kCount neighbouring tokens, all of which exist.
template <typename E, int kCount>
struct LogRatios {
  E trainer[kCount];
  E inference[kCount];
  uint8_t mask[kCount];

  __device__ __forceinline__ void load(const HistogramArgs& args, int64_t index) {
    load_tokens_as_stored(args.trainer_logprobs, index, trainer);
    load_tokens_as_stored(args.inference_logprobs, index, inference);
    load_aligned(args.loss_mask, index, mask);
    widen_tokens(args.trainer_logprobs.dtype, trainer);
    widen_tokens(args.inference_logprobs.dtype, inference);
  }
  __device__ __forceinline__ int bin(int i) const {
    return static_cast<int>(math::histogram_bin<E>(trainer[i] - inference[i], mask[i] != 0));
  }
};

template <typename E>
__device__ __forceinline__ int bin_of(const HistogramArgs& args, int64_t index) {
  LogRatios<E, 1> token;
  token.load(args, index);
  return token.bin(0);
}

// Counts tokens [begin, end) in `table`, whose element 0 is that of bin 0: whole vectors of them,
// which start where inputs are aligned, and what lies before and behind these one by one.
template <typename E, int kCount>
__device__ __forceinline__ void count_span(const HistogramArgs& args, int64_t begin, int64_t end,
                                           unsigned* table) {
  const int64_t first = (begin + kCount - 1) / kCount * kCount;
  const int64_t vectors = end > first ? (end - first) / kCount : 0;
  const int64_t last = vectors > 0 ? first + vectors * kCount : begin;
  const int count = static_cast<int>(vectors);
  for (int vector = threadIdx.x; vector < count; vector += kThreads) {
    LogRatios<E, kCount> tokens;
    tokens.load(args, first + vector * kCount);
#pragma unroll
    for (int i = 0; i < kCount; ++i) atomicAdd(&table[tokens.bin(i)], 1u);
  }
  if (vectors > 0 && begin + threadIdx.x < first)
    atomicAdd(&table[bin_of<E>(args, begin + threadIdx.x)], 1u);
  for (int64_t i = last + threadIdx.x; i < end; i += kThreads)
    atomicAdd(&table[bin_of<E>(args, i)], 1u);
}

template <typename E>
__device__ __forceinline__ void count_tokens(const HistogramArgs& args, int64_t begin,
                                             int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int bin = bin_of<E>(args, i);
    if (bin != math::kNoBin)
      add_to_segment(args, bin - math::kFirstBin, args.segments.containing(i), 1);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel and launcher
// ---------------------------------------------------------------------------------------------------------------------

template <typename E, int kCount>
__global__ void __launch_bounds__(kThreads) log_ratio_histogram(const HistogramArgs args) {
  BinStorage& storage = shared_storage<BinStorage>();
  const Segments& segments = args.segments;
  const int64_t begin = int64_t{kTileSize} * blockIdx.x;
  const int64_t end = begin + kTileSize < segments.tokens ? begin + kTileSize : segments.tokens;
  const int64_t last = segments.containing(end - 1);
  int64_t segment = segments.containing(begin);
  if (last - segment >= kMostSpans) return count_tokens<E>(args, begin, end);
  for (; segment <= last; ++segment) {
    const int64_t first_of = segments.begin(segment), end_of = segments.begin(segment + 1);
    clear(storage);
    count_span<E, kCount>(args, first_of > begin ? first_of : begin, end_of < end ? end_of : end,
                          storage.tables[threadIdx.x / kWarpSize] - math::kFirstBin);
    add_tables(args, segment, storage);
    __syncthreads();  // before the tables are cleared
  }
}

template <typename E>
cudaError_t launch_histogram(const HistogramArgs& args, CUstream_st* stream) {
  constexpr int kCount = 16 / sizeof(E);
  const int64_t tiles = (args.segments.tokens + kTileSize - 1) / kTileSize;
  if (tiles == 0 || args.segments.count == 0) return cudaSuccess;
  const bool by_vectors = is_aligned(args.trainer_logprobs.data) &&
                          is_aligned(args.inference_logprobs.data) && is_aligned(args.loss_mask);
  return launch(by_vectors ? log_ratio_histogram<E, kCount> : log_ratio_histogram<E, 1>, tiles,
                kThreads, sizeof(BinStorage), stream, args);
}

}  // namespace

const char* histogram(const HistogramArgs& args, CUstream_st* stream) {
  return error_text(dispatch_compute(args.compute_dtype, [&](auto compute) {
    return launch_histogram<TypeOf<decltype(compute)>>(args, stream);
  }));
}

}  // namespace ipo_ext::cuda
