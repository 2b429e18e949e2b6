// The second launch: the loss from the tiles' losses, and the sums and metrics of every segment.
#pragma once

#include <limits>

#include "kernels/cuda/common/reduce.cuh"
#include "kernels/cuda/ipo_loss/components.cuh"
#include "kernels/cuda/ipo_loss/segments.cuh"
#include "kernels/cuda/ipo_loss/tile_sums.cuh"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

struct MergeSegments {
  __device__ __forceinline__ SegmentSums operator()(const SegmentSums& a,
                                                    const SegmentSums& b) const {
    return merge(a, b);
  }
};

struct LossStorage {
  BlockReduceStorage<double, kThreads> loss;
  BlockReduceStorage<ComponentTotals, kThreads> components;
};

// Stores the components' metrics and returns what they add to the loss, valid in thread 0. All
// threads must call.
template <typename E>
__device__ __forceinline__ double finish_components(
    const IpoLossArgs& args, BlockReduceStorage<ComponentTotals, kThreads>& storage) {
  const Workspace<E> workspace(args);
  ComponentTotals totals = {};
  for (int64_t tile = threadIdx.x; tile < args.segments.num_tiles(); tile += kThreads)
    totals = merge(totals, workspace.components[tile]);
  totals = block_reduce<kThreads>(totals, MergeComponents(), storage);
  if (threadIdx.x == 0) store_component_means<E>(args.components, totals);
  return loss_of_components<E>(args.components, totals);
}

// Block 0 makes the loss from the tiles and checks cu_seqlens; a fault in it poisons the loss and
// every gradient.
template <typename E, bool kHasComponents>
__device__ void finish_loss(const IpoLossArgs& args, LossStorage& storage) {
  const Segments& segments = args.segments;
  const Workspace<E> workspace(args);

  bool invalid = args.fault != nullptr && *args.fault != 0;
  if (segments.cu_seqlens != nullptr) {
    for (int64_t s = threadIdx.x; s <= segments.count; s += kThreads)
      invalid |= !segments.entry_is_valid(s);
  }
  const bool poisoned = __syncthreads_count(invalid) > 0;
  const double inverse = inverse_normalizer_of<E>(args);

  pdl_wait();
  double loss = 0;
  for (int64_t tile = threadIdx.x; tile < segments.num_tiles(); tile += kThreads)
    loss += workspace.tile_losses[tile];
  loss = normalized_loss(block_reduce<kThreads>(loss, Add(), storage.loss), inverse);
  if constexpr (kHasComponents) loss += finish_components<E>(args, storage.components);

  const E nan = std::numeric_limits<E>::quiet_NaN();
  if (threadIdx.x == 0) *static_cast<E*>(args.loss) = poisoned ? nan : static_cast<E>(loss);
  if (poisoned && args.gradient != nullptr) {
    for (int64_t i = threadIdx.x; i < segments.tokens; i += kThreads)
      static_cast<E*>(args.gradient)[i] = nan;
  }
}

// The slots of a segment, which only its cu_seqlens say.
struct SegmentSlots {
  int64_t segment, begin, end;

  // A warp finishes a segment of up to so many slots on its own, a block a longer one.
  static constexpr int64_t kMostOfWarp = 64;
  __device__ __forceinline__ bool are_many() const { return end - begin > kMostOfWarp; }
};

__device__ __forceinline__ SegmentSlots slots_of(const Segments& segments, int64_t segment) {
  if (segment >= segments.count) return {segment, 0, 0};
  return {segment, segments.first_slot(segment), segments.end_slot(segment)};
}

// The shared memory in which a warp finishes a segment.
struct SegmentStorage {
  SegmentSums sums;
  Fractions fractions;
};

// Returns how many tokens of a segment the policy form bounds, valid in lane 0. All lanes of one
// warp must call.
template <typename E>
__device__ __forceinline__ BoundCounts<E> bound_counts_of(const IpoLossArgs& args,
                                                          const SegmentSlots& slots) {
  const Workspace<E> workspace(args);
  BoundCounts<E> bounded = {};
  if (args.params.rules() == Rules::kDefault) return bounded;
  for (int64_t slot = slots.begin + threadIdx.x % kWarpSize; slot < slots.end; slot += kWarpSize)
    bounded = merge(bounded, workspace.bound_counts[slot]);
  return warp_reduce(bounded, MergeBoundCounts());
}

// Stores what is in storage.sums, and its means. All lanes of one warp must call.
template <typename E>
__device__ __forceinline__ void store_by_lanes(const IpoLossArgs& args, const SegmentSlots& slots,
                                               SegmentStorage& storage) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t segment = slots.segment;
  const int64_t segments = args.segments.count;
  const BoundCounts<E> bounded = bound_counts_of<E>(args, slots);
  __syncwarp();
  if (lane == 0) {
    const bool judged = args.params.judges_sequences;
    const auto verdict = judged ? Workspace<E>(args).verdicts[segment] : SequenceVerdict{};
    set_segment_rows(storage.sums, verdict, bounded);
    storage.fractions = mean_fractions(storage.sums);
  }
  __syncwarp();
  if (lane < kNumSumRows) args.sums[lane * segments + segment] = storage.sums.sums[lane];
  if (lane < extreme::kNumRows)
    args.extremes[lane * segments + segment] = storage.sums.extremes[lane];
  if (lane < mean::kNumRows) {
    static_cast<E*>(args.means)[lane * segments + segment] =
        static_cast<E>(storage.fractions.mean(lane));
  }
}

// Finishes a segment of few slots, with a lane for each row of them. All lanes of one warp must
// call.
template <typename E>
__device__ __forceinline__ void finish_short_segment(const IpoLossArgs& args,
                                                     const SegmentSlots& slots,
                                                     SegmentStorage& storage) {
  constexpr int kAtOnce = 4;
  const Workspace<E> workspace(args);
  const int lane = threadIdx.x % kWarpSize;
  double merged = empty_row(lane);
  for (int64_t slot = slots.begin; slot < slots.end; slot += kAtOnce) {
    merged = merge_tiles<kAtOnce>(merged, workspace.slots + slot, lane,
                                  [&](int i) { return slot + i < slots.end; });
  }
  store_row(merged, lane, storage.sums);
  store_by_lanes<E>(args, slots, storage);
}

// Finishes a segment of many slots. All threads of the block must call.
template <typename E>
__device__ __forceinline__ void finish_long_segment(
    const IpoLossArgs& args, const SegmentSlots& slots,
    BlockReduceStorage<SegmentSums, kThreads>& reduction, SegmentStorage& storage) {
  const Workspace<E> workspace(args);
  SegmentSums sums = empty_segment_sums();
  for (int64_t slot = slots.begin + threadIdx.x; slot < slots.end; slot += kThreads) {
    sums = merge(sums, to_segment_sums(workspace.slots[slot]));
  }
  sums = block_reduce<kThreads>(sums, MergeSegments(), reduction);
  if (threadIdx.x == 0) storage.sums = sums;
  if (threadIdx.x < kWarpSize) store_by_lanes<E>(args, slots, storage);
}

// Returns how many segments a block has: one, so that long ones do not wait for each other, until
// there are so many that most must be short.
IPO_HOST_DEVICE int64_t segments_per_block(int64_t segments) {
  constexpr int64_t kMany = 1024;
  return segments > kMany ? kThreads / kWarpSize : 1;
}

union FinishStorage {
  LossStorage loss;
  struct {
    SegmentStorage warps[kThreads / kWarpSize];
    BlockReduceStorage<SegmentSums, kThreads> reduction;
  } segments;
};

// Finishes the segments of a block: short ones side by side, then the others one by one.
template <typename E>
__device__ void finish_segments(const IpoLossArgs& args, int64_t block, FinishStorage& storage) {
  const int64_t per_block = segments_per_block(args.segments.count);
  const int warp = threadIdx.x / kWarpSize;
  const int64_t first = block * per_block;
  SegmentSlots slots = slots_of(args.segments, warp < per_block ? first + warp : INT64_MAX);
  pdl_wait();
  const bool many = slots.are_many();
  if (!many && slots.segment < args.segments.count)
    finish_short_segment<E>(args, slots, storage.segments.warps[warp]);
  if (!__syncthreads_or(many)) return;
  for (int64_t segment = first; segment < first + per_block; ++segment) {
    slots = slots_of(args.segments, segment);
    if (slots.are_many())
      finish_long_segment<E>(args, slots, storage.segments.reduction, storage.segments.warps[0]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

// Block 0 finishes the loss, the others the segments. They start while the tiles are still summed,
// with what does not depend on them.
template <typename E, bool kHasComponents>
__global__ void __launch_bounds__(kThreads) ipo_loss_finish(const IpoLossArgs args) {
  FinishStorage& storage = shared_storage<FinishStorage>();
  if (blockIdx.x == 0) {
    finish_loss<E, kHasComponents>(args, storage.loss);
  } else {
    finish_segments<E>(args, blockIdx.x - 1, storage);
  }
}

}  // namespace ipo_ext::cuda
