// Score centering: a warp for each token, then a block for each segment's sum, then the loss.
#include "kernels/cuda/common/reduce.cuh"
#include "kernels/cuda/common/warp.cuh"
#include "kernels/score_centering.h"

namespace ipo_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerBlock = kThreads / kWarpSize;

using SumStorage = BlockReduceStorage<double, kThreads>;

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// Returns whether a contract is broken that was looked for before.
__device__ __forceinline__ bool has_fault(const CenteringArgs& args) {
  return args.fault != nullptr && *args.fault != 0;
}

// The same, and of cu_seqlens. All threads of the block must call.
__device__ __forceinline__ bool is_poisoned(const CenteringArgs& args) {
  bool invalid = has_fault(args);
  if (args.segments.cu_seqlens != nullptr) {
    for (int64_t s = threadIdx.x; s <= args.segments.count; s += kThreads)
      invalid |= !args.segments.entry_is_valid(s);
  }
  return __syncthreads_or(invalid) != 0;
}

// Said how many blocks a multiprocessor takes, ptxas (13.0) spills nothing in fp64 on sm_90.
template <typename E>
__global__ void __launch_bounds__(kThreads, 3) centering_tokens(const CenteringArgs args) {
  math::CenteringParams<E> params = centering_params_for<E>(args);
  if (has_fault(args)) params.inv_normalizer = std::numeric_limits<E>::quiet_NaN();
  const int64_t token = blockIdx.x * int64_t{kTokensPerBlock} + threadIdx.x / kWarpSize;
  if (token < args.segments.tokens) center_token<E>(args, params, token, Warp());
}

template <typename E>
__global__ void __launch_bounds__(kThreads) centering_segments(const CenteringArgs args) {
  SumStorage& storage = shared_storage<SumStorage>();
  const int64_t s = blockIdx.x;
  const int64_t end = args.segments.begin(s + 1);
  double sum = 0;
  for (int64_t token = args.segments.begin(s) + threadIdx.x; token < end; token += kThreads)
    sum += args.terms[token];
  sum = block_reduce<kThreads>(sum, Add(), storage);
  if (threadIdx.x == 0) store_centering_sum<E>(args, s, sum);
}

// One block, which alone looks through cu_seqlens.
template <typename E>
__global__ void __launch_bounds__(kThreads) centering_loss(const CenteringArgs args) {
  SumStorage& storage = shared_storage<SumStorage>();
  const bool poisoned = is_poisoned(args);
  double sum = 0;
  for (int64_t s = threadIdx.x; s < args.segments.count; s += kThreads) sum += args.sums[s];
  sum = block_reduce<kThreads>(sum, Add(), storage);
  constexpr E kNaN = std::numeric_limits<E>::quiet_NaN();
  if (poisoned && args.gradient != nullptr) {
    const int64_t elements = args.segments.tokens * args.width;
    for (int64_t i = threadIdx.x; i < elements; i += kThreads)
      store_centering_gradient(args, i, kNaN);
  }
  if (threadIdx.x != 0) return;
  store_centering_loss<E>(args, sum);
  if (poisoned) *static_cast<E*>(args.loss) = kNaN;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

template <typename E>
cudaError_t launch_all(const CenteringArgs& args, CUstream_st* stream) {
  const int64_t blocks = (args.segments.tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  cudaError_t error = cudaSuccess;
  if (blocks > 0) error = launch(centering_tokens<E>, blocks, kThreads, 0, stream, args);
  if (error == cudaSuccess && args.segments.count > 0)
    error = launch(centering_segments<E>, args.segments.count, kThreads, sizeof(SumStorage), stream,
                   args);
  if (error != cudaSuccess) return error;
  return launch(centering_loss<E>, 1, kThreads, sizeof(SumStorage), stream, args);
}

}  // namespace

const char* score_centering(const CenteringArgs& args, CUstream_st* stream) {
  return error_text(dispatch_compute(args.compute_dtype, [&](auto compute) {
    return launch_all<TypeOf<decltype(compute)>>(args, stream);
  }));
}

}  // namespace ipo_ext::cuda
