// The first launch: the gradient of every token, and the sums of every span, in one pass over the
// tokens.
#pragma once

#include "kernels/cuda/ipo_loss/segments.cuh"
#include "kernels/cuda/ipo_loss/tile_sums.cuh"
#include "kernels/cuda/ipo_loss/tokens.cuh"

namespace ipo_ext::cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kBlockTileLog2 = 10;  // the smallest tile of a block

// The shared memory of a block that works on a tile.
template <typename E>
struct TileStorage {
  TileSums<E> warps[kThreads / kWarpSize];
  bool holds[kThreads / kWarpSize];              // whether a warp has tokens of the span
  BoundCounts<E> bounded[kThreads / kWarpSize];  // under other rules than the default alone
  double loss;  // of the tile; only the first thread adds to it, which frees registers of all
};

// Tokens [begin, end) of a tile, which belong to one segment.
struct Span {
  int begin, end;

  __device__ __forceinline__ bool has(int index) const { return index >= begin && index < end; }
  __device__ __forceinline__ bool meets(int first, int count) const {
    return first < end && first + count > begin;
  }
};

// Adds those of the tile's tokens [index, index + kCount) that are in the span to the thread's
// sums, and writes their gradients.
template <Rules kRules, typename E, int kCount>
__device__ __forceinline__ void process_tokens(const IpoLossArgs& args, const LossParams<E>& params,
                                               const TokenVector<E, kCount>& vector,
                                               int64_t tile_begin, int index, const Span& span,
                                               TileSums<E>& sums, BoundCounts<E>& bounded) {
  E gradients[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Token<E> token = vector.token(i);
    token.active &= span.has(index + i);
    const TokenLoss<E> loss = token_loss<kRules>(token, params);
    add_token(sums, token, loss);
    add_extras(sums, token, loss.active & loss.finite, extras_of(args));
    if constexpr (kRules == Rules::kAny) add_token(bounded, loss);
    gradients[i] = loss.gradient;
  }
  if (args.gradient == nullptr) return;
  E* gradient = static_cast<E*>(args.gradient) + tile_begin + index;
  if (index >= span.begin && index + kCount <= span.end) {
    store_aligned(gradient, gradients);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (span.has(index + i)) gradient[i] = gradients[i];
  }
}

// Processes the tokens that end the batch and are no whole vector, one by one.
template <Rules kRules, typename E>
__device__ __forceinline__ void process_last_tokens(const IpoLossArgs& args,
                                                    const LossParams<E>& params, int64_t tile_begin,
                                                    int index, const Span& span, TileSums<E>& sums,
                                                    BoundCounts<E>& bounded) {
  for (int i = index < span.begin ? span.begin : index; i < span.end; ++i) {
    TokenVector<E, 1> token;
    token.load(args, tile_begin + i);
    token.widen(args);
    process_tokens<kRules>(args, params, token, tile_begin, i, span, sums, bounded);
  }
}

// Merges the warps' sums of a span into its slot, and adds its loss to the tile's. All threads
// must call; `storage` may be used again at once.
template <Rules kRules, typename E>
__device__ __forceinline__ void finish_span(const TileSums<E>& sums, const BoundCounts<E>& bounded,
                                            bool warp_holds, TileStorage<E>& storage,
                                            const Workspace<E>& workspace, int64_t slot) {
  constexpr int kAtOnce = 4;  // more would take registers from the tokens
  constexpr int kWarps = kThreads / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (warp_holds) warp_reduce_to(sums, storage.warps[warp]);
  if (lane == 0) storage.holds[warp] = warp_holds;
  if constexpr (kRules == Rules::kAny) {
    const BoundCounts<E> of_warp = warp_reduce(bounded, MergeBoundCounts());
    if (lane == 0) storage.bounded[warp] = of_warp;
  }
  __syncthreads();
  if (warp == 0) {
    double merged = empty_row(lane);
#pragma unroll
    for (int first = 0; first < kWarps; first += kAtOnce) {
      merged = merge_tiles<kAtOnce>(merged, storage.warps + first, lane,
                                    [&](int i) { return storage.holds[first + i]; });
    }
    store_row(merged, lane, workspace.slots[slot]);
    const double loss =
        __shfl_sync(kFullWarp, merged, sum::pg_loss) + __shfl_sync(kFullWarp, merged, sum::kl_loss);
    if (lane == 0) storage.loss += loss;
    if (kRules == Rules::kAny && lane == 0) {
      BoundCounts<E> total = {};
      for (int other = 0; other < kWarps; ++other) total = merge(total, storage.bounded[other]);
      workspace.bound_counts[slot] = total;
    }
  }
  __syncthreads();  // before the next use of storage
}

// Processes the block's tile, each of whose spans it sums to the span's slot. A thread has a vector
// of kCount neighbouring tokens of every kThreads * kCount, so at most one where four fit a load
// and there are up to 2^21 tokens; it loads them before it knows their segment.
template <Rules kRules, typename E, int kCount>
__device__ __forceinline__ void process_tile(const IpoLossArgs& args, TileStorage<E>& storage) {
  constexpr int kRound = kThreads * kCount;
  const Segments& segments = args.segments;
  pdl_trigger();

  const int64_t tile = blockIdx.x;
  const int64_t tile_begin = tile * segments.tile_size();
  const int64_t left = segments.tokens - tile_begin;
  const int size = static_cast<int>(left < segments.tile_size() ? left : segments.tile_size());
  const int thread_index = threadIdx.x * kCount;

  // Loads that wait for nothing are started here, all before the first that does.
  const int32_t probed = probe_segments(segments, 0, segments.count);
  TokenVector<E, kCount> vector;
  const auto load_round = [&](int round) {
    const int index = round + thread_index;
    if (index + kCount <= size) vector.load(args, tile_begin + index);
  };
  load_round(0);
  bool loaded = true;
  LossParams<E> params = params_for<E>(args);
  const Workspace<E> workspace(args);
  int64_t segment = block_segment_of(segments, tile_begin, probed);
  vector.widen(args);

  if (threadIdx.x == 0) storage.loss = 0;
  int begin = 0;
  for (; begin < size && segment < segments.count; ++segment) {
    const int64_t segment_end = segments.begin(segment + 1) - tile_begin;
    const int end = segment_end < size ? static_cast<int>(segment_end) : size;
    if (end <= begin) continue;
    const int64_t slot = Segments::slot(tile, segment);
    if constexpr (kRules == Rules::kAny) {
      if (params.judges_sequences) params.sequence = workspace.verdicts[segment];
    }

    const Span span = {begin, end};
    TileSums<E> sums = empty_tile_sums<E>();
    BoundCounts<E> bounded = {};
    bool warp_holds = false;
    for (int round = begin - begin % kRound; round < end; round += kRound) {
      if (!loaded) {
        load_round(round);
        vector.widen(args);
      }
      loaded = false;  // another span finds them in the L1 cache, and registers are short
      const int index = round + thread_index;
      const int first_of_warp = round + threadIdx.x / kWarpSize * kWarpSize * kCount;
      if (!span.meets(first_of_warp, kWarpSize * kCount)) continue;
      warp_holds = true;
      if (kCount == 1 || index + kCount <= size) {
        if (span.meets(index, kCount))
          process_tokens<kRules>(args, params, vector, tile_begin, index, span, sums, bounded);
      } else {
        process_last_tokens<kRules>(args, params, tile_begin, index, span, sums, bounded);
      }
    }
    finish_span<kRules>(sums, bounded, warp_holds, storage, workspace, slot);
    begin = end;
  }
  if (threadIdx.x == 0) workspace.tile_losses[tile] = storage.loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

// The blocks that a multiprocessor must have registers for. Left to itself the compiler thinks of
// more and spills, as all rules in fp64 would with two.
template <Rules kRules, typename E>
constexpr int kBlocksPerMultiprocessor = kRules == Rules::kAny && sizeof(E) == 8 ? 1 : 2;

template <Rules kRules, typename E, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<kRules, E>)
    ipo_loss_tiles(const IpoLossArgs args) {
  process_tile<kRules, E, kCount>(args, shared_storage<TileStorage<E>>());
}

}  // namespace ipo_ext::cuda
