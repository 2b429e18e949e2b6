// The entry points for rows of logits: the plan of a launch, the launch for the dtype at hand, and
// the kernel that looks for contract faults before any row is read. None synchronises with the
// host.
#include "kernels/cuda/common/reduce.cuh"
#include "kernels/cuda/logits/launch.cuh"

namespace ipo_ext::cuda {
namespace {

constexpr int kFaultThreads = 512;

struct Plus {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

// One block looks at whatever a host would have to synchronise for.
__global__ void __launch_bounds__(kFaultThreads) logits_find_faults(const LogitsArgs args) {
  BlockReduceStorage<int64_t, kFaultThreads>& storage =
      shared_storage<BlockReduceStorage<int64_t, kFaultThreads>>();
  bool fault = false;
  int64_t active = 0;
  for (int64_t row = threadIdx.x; row < args.logits.rows; row += kFaultThreads) {
    if (!row_is_active(args, row)) continue;
    ++active;
    fault |= !label_is_valid(args, row) || !temperature_is_valid(args, row);
  }
  active = block_reduce<kFaultThreads>(active, Plus(), storage);
  if (has_loss(args)) {
    for (int64_t s = threadIdx.x; s <= args.loss.segments.count; s += kFaultThreads)
      fault |= !args.loss.segments.entry_is_valid(s);
    fault |= !(load_scalar(args.loss.normalizer) >= 0);
  }
  const int faults = __syncthreads_count(fault);
  if (threadIdx.x == 0) *args.fault = faults > 0 || active > args.max_active;
}

// Columns are counted in 32 bits, with room for the vectors around a row.
constexpr int64_t kMostColumns = int64_t{1} << 30;

}  // namespace

const char* make_plan(const LogitsArgs& args, LaunchPlan& plan) {
  plan = {};
  if (args.logits.rows == 0) return nullptr;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error_text(error);
  plan = dispatch_floating(args.logits.dtype, [&](auto stored) {
    return plan_for<TypeOf<decltype(stored)>>(args, device);
  });
  return nullptr;
}

const char* find_faults(const LogitsArgs& args, CUstream_st* stream) {
  using Storage = BlockReduceStorage<int64_t, kFaultThreads>;
  return error_text(launch(logits_find_faults, 1, kFaultThreads, sizeof(Storage), stream, args));
}

const char* logits(const LogitsArgs& args, const LaunchPlan& plan, CUstream_st* stream) {
  if (args.logits.rows == 0) return nullptr;
  if (args.logits.columns > kMostColumns) return "more than 2^30 columns";
  return error_text(dispatch_floating(args.logits.dtype, [&](auto stored) {
    return launch_logits<TypeOf<decltype(stored)>>(args, plan, stream);
  }));
}

}  // namespace ipo_ext::cuda
