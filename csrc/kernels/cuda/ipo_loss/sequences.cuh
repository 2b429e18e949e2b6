// The two launches before the first where sequences are judged: what the rules look at, from the
// log-ratios of all tokens, then the verdict on every sequence.
#pragma once

#include "kernels/cuda/common/reduce.cuh"
#include "kernels/cuda/ipo_loss/segments.cuh"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// A warp sums a tile on its own, without a barrier. The tiles depend on the number of tokens alone,
// and there are so few that a warp can merge all of them.
IPO_HOST_DEVICE Segments judged_segments(Segments segments) {
  constexpr int kSmallestLog2 = 9;
  constexpr int64_t kTiles = 8192;
  segments.tile_log2 = kSmallestLog2;
  while (segments.tile_size() * kTiles < segments.tokens) ++segments.tile_log2;
  return segments;
}

struct MergeSequences {
  template <typename E>
  __device__ __forceinline__ SequenceSums<E> operator()(const SequenceSums<E>& a,
                                                        const SequenceSums<E>& b) const {
    return merge(a, b);
  }
};

// Sums tokens [begin, end), of which each lane of the warp has every 32nd. Valid in lane 0; all
// lanes must call.
template <typename E, typename Trainer, typename Inference>
__device__ __forceinline__ SequenceSums<E> sum_span_of(const IpoLossArgs& args, int64_t begin,
                                                       int64_t end) {
  const auto* trainer = static_cast<const Trainer*>(args.trainer_logprobs.data) + begin;
  const auto* inference = static_cast<const Inference*>(args.inference_logprobs.data) + begin;
  const uint8_t* mask = args.loss_mask + begin;
  const WantedSums wanted = wanted_by(args.sequence_rules);
  const int count = static_cast<int>(end - begin);
  SequenceSums<E> sums = empty_sequence_sums<E>();
#pragma unroll 4
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    const E x = convert<E>(trainer[i]) - convert<E>(inference[i]);
    const E advantage = wanted.negative ? load_token<E>(args.advantages, begin + i, 0) : E(0);
    add_to_sequence<E>(sums, x, advantage, mask[i] != 0, wanted);
  }
  return warp_reduce(sums, MergeSequences());
}

// The same of inputs of any dtypes, which no token has to ask for.
template <typename E>
__device__ __forceinline__ SequenceSums<E> sum_span(const IpoLossArgs& args, int64_t begin,
                                                    int64_t end) {
  return dispatch_floating(args.trainer_logprobs.dtype, [&](auto trainer) {
    return dispatch_floating(args.inference_logprobs.dtype, [&](auto inference) {
      return sum_span_of<E, TypeOf<decltype(trainer)>, TypeOf<decltype(inference)>>(args, begin,
                                                                                    end);
    });
  });
}

template <typename E>
__global__ void __launch_bounds__(kThreads, 2) ipo_loss_sum_sequences(const IpoLossArgs args) {
  const Segments segments = judged_segments(args.segments);
  const Workspace<E> workspace(args);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarpSize;
  if (tile >= segments.num_tiles()) return;
  int64_t begin = tile * segments.tile_size();
  const int64_t left = segments.tokens - begin;
  const int64_t tile_end = begin + (left < segments.tile_size() ? left : segments.tile_size());
  for (int64_t segment = segments.containing(begin); begin < tile_end && segment < segments.count;
       ++segment) {
    const int64_t segment_end = segments.begin(segment + 1);
    const int64_t end = segment_end < tile_end ? segment_end : tile_end;
    if (end <= begin) continue;
    const SequenceSums<E> sums = sum_span<E>(args, begin, end);
    if (threadIdx.x % kWarpSize == 0)
      workspace.sequence_slots[Segments::slot(tile, segment)] = sums;
    begin = end;
  }
}

// Returns the segment of a thread's warp; one that is none where there are too many warps.
__device__ __forceinline__ int64_t segment_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarpSize;
}

// Merges what the last launch has left of segment s. Valid in lane 0; all lanes must call.
template <typename E>
__device__ __forceinline__ SequenceSums<E> merge_sequence(const IpoLossArgs& args, int64_t s) {
  const Segments segments = judged_segments(args.segments);
  const Workspace<E> workspace(args);
  const int lane = threadIdx.x % kWarpSize;
  SequenceSums<E> sums = empty_sequence_sums<E>();
  const int64_t end = segments.end_slot(s);
  for (int64_t slot = segments.first_slot(s) + lane; slot < end; slot += kWarpSize)
    sums = merge(sums, workspace.sequence_slots[slot]);
  return warp_reduce(sums, MergeSequences());
}

// A warp judges a sequence.
template <typename E>
__global__ void __launch_bounds__(kThreads) ipo_loss_judge_sequences(const IpoLossArgs args) {
  const int64_t s = segment_of_warp();
  if (s >= args.segments.count) return;
  const SequenceSums<E> sums = merge_sequence<E>(args, s);
  if (threadIdx.x % kWarpSize == 0) {
    Workspace<E>(args).verdicts[s] = judge(sums, args.sequence_rules, args.params.rollout_low);
  }
}

// A warp stores what a sequence would be judged by.
template <typename E>
__global__ void __launch_bounds__(kThreads)
    ipo_loss_store_statistics(const SequenceStatisticsArgs args) {
  const int64_t s = segment_of_warp();
  if (s >= args.loss.segments.count) return;
  const SequenceSums<E> sums = merge_sequence<E>(args.loss, s);
  if (threadIdx.x % kWarpSize == 0) store_statistics(args, sums, s);
}

// A thread judges the sequence of a piece.
template <typename E>
__global__ void __launch_bounds__(kThreads) ipo_loss_judge_pieces(const IpoLossArgs args) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s < args.segments.count) Workspace<E>(args).verdicts[s] = verdict_on_piece<E>(args, s);
}

}  // namespace ipo_ext::cuda
