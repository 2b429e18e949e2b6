// Tier 1 on CUDA: gradient and tile sums in one pass over the tokens, then one small launch for the
// loss and the metrics of every packed sequence. No atomics, no host synchronisation, no memory but
// the caller's; bitwise equal run to run on any GPU, because tiles depend on the number of tokens
// alone.
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/tile_sums.cuh"
#include "kernels/cuda/vector_load.cuh"
#include "kernels/ipo_loss.h"

namespace ipo_ext::cuda {
namespace {

using namespace ipo_ext::math;

constexpr int kThreads = 256;

// Tokens that a thread loads and stores at once: 16 bytes in the compute dtype.
template <typename E>
constexpr int kTokensPerLoad = 16 / sizeof(E);

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

struct MergeSegments {
  __device__ __forceinline__ SegmentSums operator()(const SegmentSums& a,
                                                    const SegmentSums& b) const {
    return merge(a, b);
  }
};

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

// What a thread loads in a round of the search below: where one of so many candidates begins.
__device__ __forceinline__ int32_t probe_segments(const Segments& segments, int64_t first,
                                                  int64_t candidates) {
  const int64_t probe = threadIdx.x * ((candidates + kThreads - 1) / kThreads);
  return candidates > 1 && probe < candidates ? segments.cu_seqlens[first + probe] : 0;
}

// The last segment that begins at or before `token`, the same in all threads of the block, all of
// which must call. Each round every thread probes one candidate, so 256 segments take one round of
// loads, which the caller has made before, and 65,536 take two.
__device__ __forceinline__ int64_t block_segment_of(const Segments& segments, int64_t token,
                                                    int32_t probed) {
  int64_t first = 0;
  int64_t candidates = segments.count;
  while (candidates > 1) {
    const int64_t stride = (candidates + kThreads - 1) / kThreads;
    const bool begun = threadIdx.x * stride < candidates && probed <= token;
    const int begun_probes = __syncthreads_count(begun);
    const int64_t skipped = begun_probes > 0 ? (begun_probes - 1) * stride : 0;
    first += skipped;
    candidates = candidates - skipped < stride ? candidates - skipped : stride;
    probed = probe_segments(segments, first, candidates);
  }
  return first;
}

// kCount neighbouring tokens.
template <typename E, int kCount>
struct TokenGroup {
  E trainer[kCount];
  E inference[kCount];
  E advantage[kCount];
  E teacher[kCount];
  E weight[kCount];
  E entropy[kCount];
  uint32_t mask;  // a byte each

  // Tokens [index, index + kCount), all of which exist. No load waits for another, so half
  // precision is widened later, by widen().
  __device__ __forceinline__ void load(const IpoLossArgs& args, int64_t index) {
    for_each(args, [=](const TokenInput& input, E(&values)[kCount]) {
      load_tokens_as_stored(input, index, values);
    });
    load_mask(args.loss_mask, index);
  }
  __device__ __forceinline__ void widen(const IpoLossArgs& args) {
    for_each(args, [](const TokenInput& input, E(&values)[kCount]) {
      widen_tokens(input.dtype, values);
    });
  }

  // visit(input, values) for the inputs that there are.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const IpoLossArgs& args, const Visit& visit) {
    visit(args.trainer_logprobs, trainer);
    visit(args.inference_logprobs, inference);
    visit(args.advantages, advantage);
    if (args.teacher_logprobs.data != nullptr) visit(args.teacher_logprobs, teacher);
    if (args.loss_weights.data != nullptr) visit(args.loss_weights, weight);
    if (args.entropy.data != nullptr) visit(args.entropy, entropy);
  }

  __device__ __forceinline__ void load_mask(const uint8_t* from, int64_t index) {
    if constexpr (kCount == 1) {
      mask = from[index];
    } else {
      using Word = typename WordOf<kCount>::Type;
      mask = __ldg(reinterpret_cast<const Word*>(from + index));
    }
  }
  __device__ __forceinline__ bool active(int i) const { return (mask >> (8 * i)) & 0xffu; }

  __device__ __forceinline__ Token<E> token(int i, const IpoLossArgs& args) const {
    return {trainer[i],
            inference[i],
            advantage[i],
            args.teacher_logprobs.data != nullptr ? teacher[i] : E(0),
            args.loss_weights.data != nullptr ? weight[i] : E(1),
            active(i),
            args.entropy.data != nullptr ? entropy[i] : E(0)};
  }
};

template <typename E>
struct TileStorage {
  TileSums<E> warps[kThreads / kWarpSize];
  bool holds[kThreads / kWarpSize];  // whether a warp has tokens of the piece
  bool drops_sequence;               // whether a token of the piece does
  double loss;  // of the tile; the first thread's, which frees registers of all
};

// Tokens [begin, end) of a tile, which are of one segment.
struct Piece {
  int begin, end;

  __device__ __forceinline__ bool has(int index) const { return index >= begin && index < end; }
  __device__ __forceinline__ bool meets(int first, int count) const {
    return first < end && first + count > begin;
  }
};

// Adds those of the tile's tokens [index, index + kCount) that are in the piece to the thread's
// sums, and writes their gradients.
template <Rules kRules, typename E, int kCount>
__device__ __forceinline__ void process_tokens(const IpoLossArgs& args, const LossParams<E>& params,
                                               const TokenGroup<E, kCount>& group,
                                               int64_t tile_begin, int index, const Piece& piece,
                                               TileSums<E>& sums, TileStorage<E>& storage) {
  E gradients[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Token<E> token = group.token(i, args);
    token.active &= piece.has(index + i);
    const TokenLoss<E> loss = token_loss<kRules>(token, params);
    add_token(sums, token, loss, extras_of(args));
    if constexpr (kRules == Rules::kAny) {
      if (drops_rollout(token.active, loss.log_ratio, params.rollout_low.value))
        storage.drops_sequence = true;
    }
    gradients[i] = loss.gradient;
  }
  if (args.gradient == nullptr) return;
  E* gradient = static_cast<E*>(args.gradient) + tile_begin + index;
  if (index >= piece.begin && index + kCount <= piece.end) {
    store_aligned(gradient, gradients);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (piece.has(index + i)) gradient[i] = gradients[i];
  }
}

// The tokens that end the batch and are no whole group, one by one.
template <Rules kRules, typename E>
__device__ __forceinline__ void process_last_tokens(const IpoLossArgs& args,
                                                    const LossParams<E>& params, int64_t tile_begin,
                                                    int index, const Piece& piece,
                                                    TileSums<E>& sums, TileStorage<E>& storage) {
  for (int i = index < piece.begin ? piece.begin : index; i < piece.end; ++i) {
    TokenGroup<E, 1> token;
    token.load(args, tile_begin + i);
    token.widen(args);
    process_tokens<kRules>(args, params, token, tile_begin, i, piece, sums, storage);
  }
}

// Merges the warps' sums of a piece into its slot, and adds its loss to the tile's. All threads
// must call; `storage` may be used again at once.
template <typename E>
__device__ __forceinline__ void finish_piece(const TileSums<E>& sums, bool warp_holds,
                                             TileStorage<E>& storage, TileSums<E>& slot) {
  constexpr int kAtOnce = 4;  // more would take registers from the tokens
  constexpr int kWarps = kThreads / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (warp_holds) warp_reduce_to(sums, storage.warps[warp]);
  if (lane == 0) storage.holds[warp] = warp_holds;
  __syncthreads();
  if (warp == 0) {
    double merged = empty_row(lane);
#pragma unroll
    for (int first = 0; first < kWarps; first += kAtOnce) {
      merged = merge_tiles<kAtOnce>(merged, storage.warps + first, lane,
                                    [&](int i) { return storage.holds[first + i]; });
    }
    store_row(merged, lane, slot);
    const double loss =
        __shfl_sync(kFullWarp, merged, sum::pg_loss) + __shfl_sync(kFullWarp, merged, sum::kl_loss);
    if (lane == 0) storage.loss += loss;
  }
  __syncthreads();  // before the next use of storage
}

// Whether any piece of the segment holds a token that drops it, in all threads of the block, all of
// which must call.
template <typename E>
__device__ __forceinline__ bool rollout_is_dropped(const Workspace<E>& workspace,
                                                   const Segments& segments, int64_t segment) {
  bool dropped = false;
  const int64_t end = segments.end_slot(segment);
  for (int64_t slot = segments.first_slot(segment) + threadIdx.x; slot < end; slot += kThreads)
    dropped |= workspace.rollout_flags[slot];
  return __syncthreads_or(dropped);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// Blocks that a multiprocessor must have registers for. Left to itself the compiler thinks of more
// and spills, as all rules in fp64 would with two.
template <Rules kRules, typename E>
constexpr int kBlocksTogether = kRules == Rules::kAny && sizeof(E) == 8 ? 1 : 2;

// One block a tile: each piece of a segment in it is summed to the piece's slot. A thread has
// kCount neighbouring tokens of every kThreads * kCount, so once at most where four fit a load and
// there are up to 2^21; it loads them before it knows their segment. A rollout rule launches it a
// second time, for the pieces of sequences that the first has found to be dropped.
template <Rules kRules, typename E, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<kRules, E>)
    ipo_loss_tiles(const IpoLossArgs args) {
  constexpr int kRound = kThreads * kCount;
  TileStorage<E>& storage = shared_storage<TileStorage<E>>();
  const Segments& segments = args.segments;
  const bool again = kRules == Rules::kAny && args.params.rollout_dropped;
  let_next_launch_start();

  const int64_t tile = blockIdx.x;
  const int64_t tile_begin = tile * segments.tile_size;
  const int64_t left = segments.tokens - tile_begin;
  const int size = static_cast<int>(left < segments.tile_size ? left : segments.tile_size);
  const int thread_index = threadIdx.x * kCount;

  // Loads that wait for nothing, all before the first that does.
  const int32_t probed = probe_segments(segments, 0, segments.count);
  TokenGroup<E, kCount> group;
  const auto load_round = [&](int round) {
    const int index = round + thread_index;
    if (index + kCount <= size) group.load(args, tile_begin + index);
  };
  bool loaded = !again;
  if (loaded) load_round(0);
  const LossParams<E> params =
      kRules == Rules::kAny ? gradient_params_for<E>(args) : params_for<E>(args);
  const Workspace<E> workspace(args);
  int64_t segment = block_segment_of(segments, tile_begin, probed);
  if (loaded) group.widen(args);

  if (threadIdx.x == 0) storage.loss = 0;
  int begin = 0;
  for (; begin < size && segment < segments.count; ++segment) {
    const int64_t segment_end = segments.begin(segment + 1) - tile_begin;
    const int end = segment_end < size ? static_cast<int>(segment_end) : size;
    if (end <= begin) continue;
    const int64_t slot = Segments::slot(tile, segment);
    if constexpr (kRules == Rules::kAny) {
      if (again && !rollout_is_dropped(workspace, segments, segment)) {
        if (threadIdx.x == 0) storage.loss += loss_of_piece(workspace.slots[slot]);
        begin = end;
        continue;
      }
    }

    const Piece piece = {begin, end};
    TileSums<E> sums = empty_tile_sums<E>();
    bool warp_holds = false;
    if constexpr (kRules == Rules::kAny) {
      if (threadIdx.x == 0) storage.drops_sequence = false;
      __syncthreads();
    }
    for (int round = begin - begin % kRound; round < end; round += kRound) {
      if (!loaded) {
        load_round(round);
        group.widen(args);
      }
      loaded = false;  // another piece finds them in the L1 cache, and registers are short
      const int index = round + thread_index;
      const int first_of_warp = round + threadIdx.x / kWarpSize * kWarpSize * kCount;
      if (!piece.meets(first_of_warp, kWarpSize * kCount)) continue;
      warp_holds = true;
      if (kCount == 1 || index + kCount <= size) {
        if (piece.meets(index, kCount))
          process_tokens<kRules>(args, params, group, tile_begin, index, piece, sums, storage);
      } else {
        process_last_tokens<kRules>(args, params, tile_begin, index, piece, sums, storage);
      }
    }
    finish_piece(sums, warp_holds, storage, workspace.slots[slot]);
    if (kRules == Rules::kAny && threadIdx.x == 0 && params.has_rollout_rule() && !again)
      workspace.rollout_flags[slot] = storage.drops_sequence;
    begin = end;
  }
  if (threadIdx.x == 0) workspace.tile_losses[tile] = storage.loss;
}

// Block 0: the loss from the tiles, and the check of cu_seqlens, which poisons the loss and every
// gradient.
template <typename E>
__device__ void finish_loss(const IpoLossArgs& args,
                            BlockReduceStorage<double, kThreads>& storage) {
  const Segments& segments = args.segments;
  const Workspace<E> workspace(args);

  bool invalid = args.fault != nullptr && *args.fault != 0;
  if (segments.cu_seqlens != nullptr) {
    for (int64_t s = threadIdx.x; s <= segments.count; s += kThreads)
      invalid |= !segments.entry_is_valid(s);
  }
  const bool poisoned = __syncthreads_count(invalid) > 0;
  const double inverse = inverse_normalizer_of(args);

  wait_for_last_launch();
  double loss = 0;
  for (int64_t tile = threadIdx.x; tile < segments.num_tiles(); tile += kThreads)
    loss += workspace.tile_losses[tile];
  loss = block_reduce<kThreads>(loss, Add(), storage);

  const E nan = std::numeric_limits<E>::quiet_NaN();
  if (threadIdx.x == 0)
    *static_cast<E*>(args.loss) = poisoned ? nan : static_cast<E>(normalized_loss(loss, inverse));
  if (poisoned && args.gradient != nullptr) {
    for (int64_t i = threadIdx.x; i < segments.tokens; i += kThreads)
      static_cast<E*>(args.gradient)[i] = nan;
  }
}

// The slots of a segment, which only its cu_seqlens say.
struct SegmentSlots {
  int64_t segment, begin, end;

  // Each warp finishes its own segment up to this many; beyond, the block works on it together.
  static constexpr int64_t kMostOfWarp = 64;
  __device__ __forceinline__ bool are_many() const { return end - begin > kMostOfWarp; }
};

__device__ __forceinline__ SegmentSlots slots_of(const Segments& segments, int64_t segment) {
  if (segment >= segments.count) return {segment, 0, 0};
  return {segment, segments.first_slot(segment), segments.end_slot(segment)};
}

// What a warp makes of a segment's sums.
struct SegmentStorage {
  SegmentSums sums;
  Fractions fractions;
};

// By a warp: stores what is in storage.sums, and its means.
template <typename E>
__device__ __forceinline__ void store_by_lanes(const IpoLossArgs& args, int64_t segment,
                                               bool dropped, SegmentStorage& storage) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t segments = args.segments.count;
  __syncwarp();
  if (lane == 0) {
    if (dropped) mark_dropped_rollout(storage.sums);
    storage.fractions = mean_fractions(storage.sums);
  }
  __syncwarp();
  static_assert(kNumSumRows <= kWarpSize && mean::kNumRows <= kWarpSize, "one lane a row");
  if (lane < kNumSumRows) args.sums[lane * segments + segment] = storage.sums.sums[lane];
  if (lane < extreme::kNumRows)
    args.extremes[lane * segments + segment] = storage.sums.extremes[lane];
  if (lane < mean::kNumRows) {
    static_cast<E*>(args.means)[lane * segments + segment] =
        static_cast<E>(storage.fractions.mean(lane));
  }
}

// By a warp: few slots, a lane for each row of them.
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
  bool dropped = false;
  if (args.params.has_rollout_rule()) {
    for (int64_t slot = slots.begin + lane; slot < slots.end; slot += kWarpSize)
      dropped |= workspace.rollout_flags[slot];
    dropped = __any_sync(kFullWarp, dropped);
  }
  store_row(merged, lane, storage.sums);
  store_by_lanes<E>(args, slots.segment, dropped, storage);
}

// By the block: many slots.
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
  const bool dropped =
      args.params.has_rollout_rule() && rollout_is_dropped(workspace, args.segments, slots.segment);
  if (threadIdx.x == 0) storage.sums = sums;
  if (threadIdx.x < kWarpSize) store_by_lanes<E>(args, slots.segment, dropped, storage);
}

// Segments of a block: one, so that long ones do not wait for each other, until there are so many
// that most must be short.
IPO_HOST_DEVICE int64_t segments_together(int64_t segments) {
  constexpr int64_t kMany = 1024;
  return segments > kMany ? kThreads / kWarpSize : 1;
}

union FinishStorage {
  BlockReduceStorage<double, kThreads> loss;
  struct {
    SegmentStorage warps[kThreads / kWarpSize];
    BlockReduceStorage<SegmentSums, kThreads> reduction;
  } segments;
};

template <typename E>
__device__ void finish_segments(const IpoLossArgs& args, int64_t block, FinishStorage& storage) {
  const int64_t together = segments_together(args.segments.count);
  const int warp = threadIdx.x / kWarpSize;
  const int64_t first = block * together;
  SegmentSlots slots = slots_of(args.segments, warp < together ? first + warp : INT64_MAX);
  wait_for_last_launch();
  const bool many = slots.are_many();
  if (!many && slots.segment < args.segments.count)
    finish_short_segment<E>(args, slots, storage.segments.warps[warp]);
  if (!__syncthreads_or(many)) return;
  for (int64_t segment = first; segment < first + together; ++segment) {
    slots = slots_of(args.segments, segment);
    if (slots.are_many())
      finish_long_segment<E>(args, slots, storage.segments.reduction, storage.segments.warps[0]);
  }
}

// Block 0 finishes the loss, the others the segments. Starts while the tiles are still summed, with
// what does not depend on them.
template <typename E>
__global__ void __launch_bounds__(kThreads) ipo_loss_finish(const IpoLossArgs args) {
  FinishStorage& storage = shared_storage<FinishStorage>();
  if (blockIdx.x == 0) {
    finish_loss<E>(args, storage.loss);
  } else {
    finish_segments<E>(args, blockIdx.x - 1, storage);
  }
}

template <typename E>
__global__ void __launch_bounds__(kThreads) metric_means_kernel(const MetricMeansArgs args) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s < args.segments) metric_means_of_segment<E>(args, s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

// Small batches: one group of tokens a thread, to spread over the multiprocessors. Large ones:
// about 2048 tiles however many tokens, so that the second launch stays small. Counts of a tile fit
// 32 bits by far.
int64_t tile_size_for(int64_t tokens) {
  constexpr int64_t kSmallest = kThreads * kTokensPerLoad<float>;
  constexpr int64_t kTiles = 2048;
  int64_t size = kSmallest;
  while (size * kTiles < tokens) size *= 2;
  return size;
}

Segments with_tiles(Segments segments) {
  segments.tile_size = tile_size_for(segments.tokens);
  return segments;
}

// Whether groups of tokens can be loaded and stored as vectors.
bool vectorizable(const IpoLossArgs& args) {
  return is_aligned(args.trainer_logprobs) && is_aligned(args.inference_logprobs) &&
         is_aligned(args.advantages) && is_aligned(args.teacher_logprobs) &&
         is_aligned(args.loss_weights) && is_aligned(args.entropy) &&
         is_aligned({args.loss_mask, DType::kFloat32}) &&
         is_aligned({args.gradient, DType::kFloat32});
}

template <Rules kRules, typename E>
auto tiles_kernel(const IpoLossArgs& args) {
  return vectorizable(args) ? ipo_loss_tiles<kRules, E, kTokensPerLoad<E>>
                            : ipo_loss_tiles<kRules, E, 1>;
}

template <typename E>
cudaError_t launch_ipo_loss(const IpoLossArgs& args, cudaStream_t stream) {
  static const bool may_overlap = waits_for_last_launch(ipo_loss_finish<E>);
  Device device;
  const cudaError_t unknown = current_device(device);
  if (unknown != cudaSuccess) return unknown;
  const int64_t tiles = args.segments.num_tiles();
  if (tiles > 0) {
    const auto kernel = args.params.rules() == Rules::kDefault
                            ? tiles_kernel<Rules::kDefault, E>(args)
                            : tiles_kernel<Rules::kAny, E>(args);
    cudaError_t error = launch(kernel, tiles, kThreads, sizeof(TileStorage<E>), stream, args);
    if (error == cudaSuccess && args.params.has_rollout_rule()) {
      IpoLossArgs again = args;
      again.params.rollout_dropped = true;
      error = launch(kernel, tiles, kThreads, sizeof(TileStorage<E>), stream, again);
    }
    if (error != cudaSuccess) return error;
  }
  const int64_t together = segments_together(args.segments.count);
  const int64_t blocks = 1 + (args.segments.count + together - 1) / together;
  // Nothing but the tiles may still be under way.
  return launch_after(ipo_loss_finish<E>, blocks, kThreads, sizeof(FinishStorage), stream, args,
                      may_overlap && device.capability >= 90 && tiles > 0);
}

}  // namespace

size_t workspace_bytes(const IpoLossArgs& args) {
  const Segments segments = with_tiles(args.segments);
  return args.compute_dtype == DType::kFloat64 ? Workspace<double>::bytes(args, segments)
                                               : Workspace<float>::bytes(args, segments);
}

const char* ipo_loss(IpoLossArgs args, CUstream_st* stream) {
  args.segments = with_tiles(args.segments);
  return error_text(args.compute_dtype == DType::kFloat64 ? launch_ipo_loss<double>(args, stream)
                                                          : launch_ipo_loss<float>(args, stream));
}

const char* metric_means(const MetricMeansArgs& args, CUstream_st* stream) {
  if (args.segments == 0) return nullptr;
  const int64_t blocks = (args.segments + kThreads - 1) / kThreads;
  const auto kernel = args.compute_dtype == DType::kFloat64 ? metric_means_kernel<double>
                                                            : metric_means_kernel<float>;
  return error_text(launch(kernel, blocks, kThreads, 0, stream, args));
}

}  // namespace ipo_ext::cuda
