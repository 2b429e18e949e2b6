// The second launch: the loss from the tiles' losses, and the sums and metrics of every segment.
#pragma once

#include <limits>

#include "kernels/cuda/common/reduce.cuh"
#include "kernels/cuda/ipo_loss/components.cuh"
#include "kernels/cuda/ipo_loss/segments.cuh"
#include "kernels/cuda/ipo_loss/tile_sums.cuh"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// Of a block, as many as there can be: the loads of a long segment's slots are what is waited for.
constexpr int kFinishThreads = 1024;
constexpr int kFinishWarps = kFinishThreads / kWarpSize;

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

struct LossStorage {
  BlockReduceStorage<double, kFinishThreads> loss;
  BlockReduceStorage<ComponentTotals, kFinishThreads> components;
};

// Stores the components' metrics and returns what they add to the loss, valid in thread 0. All
// threads must call.
template <typename E>
__device__ __forceinline__ double finish_components(
    const IpoLossArgs& args, BlockReduceStorage<ComponentTotals, kFinishThreads>& storage) {
  const Workspace<E> workspace(args);
  ComponentTotals totals = {};
  for (int64_t tile = threadIdx.x; tile < args.segments.num_tiles(); tile += kFinishThreads)
    totals = merge(totals, workspace.components[tile]);
  totals = block_reduce<kFinishThreads>(totals, MergeComponents(), storage);
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
    for (int64_t s = threadIdx.x; s <= segments.count; s += kFinishThreads)
      invalid |= !segments.entry_is_valid(s);
  }
  const bool poisoned = __syncthreads_count(invalid) > 0;
  const double inverse = inverse_normalizer_of<E>(args);

  pdl_wait();
  double loss = 0;
  for (int64_t tile = threadIdx.x; tile < segments.num_tiles(); tile += kFinishThreads)
    loss += workspace.tile_losses[tile];
  loss = normalized_loss(block_reduce<kFinishThreads>(loss, Add(), storage.loss), inverse);
  if constexpr (kHasComponents) loss += finish_components<E>(args, storage.components);

  const E nan = std::numeric_limits<E>::quiet_NaN();
  if (threadIdx.x == 0) *static_cast<E*>(args.loss) = poisoned ? nan : static_cast<E>(loss);
  if (poisoned && args.gradient != nullptr) {
    for (int64_t i = threadIdx.x; i < segments.tokens; i += kFinishThreads)
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

// Merges every stride-th group of kSlotsAtOnce slots of a segment, from the group that begins at
// `first` on. A lane has a row of them, so that all loads of a group are under way together.
template <typename E>
__device__ __forceinline__ double merge_slots(const IpoLossArgs& args, const SegmentSlots& slots,
                                              int64_t first, int stride) {
  constexpr int kSlotsAtOnce = 8;
  const Workspace<E> workspace(args);
  const int lane = threadIdx.x % kWarpSize;
  double merged = empty_row(lane);
  for (int64_t slot = slots.begin + first * kSlotsAtOnce; slot < slots.end;
       slot += stride * kSlotsAtOnce) {
    merged = merge_tiles<kSlotsAtOnce>(merged, workspace.slots + slot, lane,
                                       [&](int i) { return slot + i < slots.end; });
  }
  return merged;
}

// Finishes a segment of few slots. All lanes of one warp must call.
template <typename E>
__device__ __forceinline__ void finish_short_segment(const IpoLossArgs& args,
                                                     const SegmentSlots& slots,
                                                     SegmentStorage& storage) {
  store_row(merge_slots<E>(args, slots, 0, 1), threadIdx.x % kWarpSize, storage.sums);
  store_by_lanes<E>(args, slots, storage);
}

// The rows of what each warp has merged of a long segment.
using WarpRows = double[kFinishWarps][kWarpSize];

// Finishes a segment of many slots. All threads of the block must call; `rows` may be used again at
// once.
template <typename E>
__device__ __forceinline__ void finish_long_segment(const IpoLossArgs& args,
                                                    const SegmentSlots& slots, WarpRows& rows,
                                                    SegmentStorage& storage) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  rows[warp][lane] = merge_slots<E>(args, slots, warp, kFinishWarps);
  __syncthreads();
  if (warp == 0) {
    double merged = empty_row(lane);
    for (int other = 0; other < kFinishWarps; ++other)
      merged = merge_rows(merged, rows[other][lane], lane);
    store_row(merged, lane, storage.sums);
    store_by_lanes<E>(args, slots, storage);
  }
  __syncthreads();  // before the next use of rows
}

// Returns how many segments a block has: few, so that long ones do not wait for each other, until
// there are so many that most must be short.
IPO_HOST_DEVICE int64_t segments_per_block(int64_t segments) {
  constexpr int64_t kBlocks = 128;  // about as many as a device has multiprocessors
  const int64_t each = (segments + kBlocks - 1) / kBlocks;
  return each < kFinishWarps ? each : kFinishWarps;
}

union FinishStorage {
  LossStorage loss;
  struct {
    SegmentStorage warps[kFinishWarps];
    WarpRows rows;
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
      finish_long_segment<E>(args, slots, storage.segments.rows, storage.segments.warps[0]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

// Block 0 finishes the loss, the others the segments. They start while the tiles are still summed,
// with what does not depend on them.
template <typename E, bool kHasComponents>
__global__ void __launch_bounds__(kFinishThreads) ipo_loss_finish(const IpoLossArgs args) {
  FinishStorage& storage = shared_storage<FinishStorage>();
  if (blockIdx.x == 0) {
    finish_loss<E, kHasComponents>(args, storage.loss);
  } else {
    finish_segments<E>(args, blockIdx.x - 1, storage);
  }
}

}  // namespace ipo_ext::cuda
