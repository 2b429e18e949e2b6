// Tier 1 on CUDA: gradient and tile sums in one pass over the tokens, then one small launch for the
// loss and the metrics of every packed sequence. No atomics, no host synchronisation, no memory but
// the caller's; bitwise equal run to run on any GPU, because tiles depend on the number of tokens
// alone.
#include "kernels/cuda/reduce.cuh"
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

struct MergeTiles {
  template <typename E>
  __device__ __forceinline__ TileSums<E> operator()(const TileSums<E>& a,
                                                    const TileSums<E>& b) const {
    return merge(a, b);
  }
};

struct MergeSegments {
  __device__ __forceinline__ SegmentSums operator()(const SegmentSums& a,
                                                    const SegmentSums& b) const {
    return merge(a, b);
  }
};

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

// The last segment that begins at or before `token`, the same in all threads of the block, all of
// which must call. Each round every thread probes one candidate, so 256 segments take one round of
// loads and 65,536 take two.
__device__ __forceinline__ int64_t block_segment_of(const Segments& segments, int64_t token) {
  int64_t first = 0;
  int64_t candidates = segments.count;
  while (candidates > 1) {
    const int64_t stride = (candidates + kThreads - 1) / kThreads;
    const int64_t probe = threadIdx.x * stride;
    const bool begun = probe < candidates && segments.begin(first + probe) <= token;
    const int begun_probes = __syncthreads_count(begun);
    const int64_t skipped = begun_probes > 0 ? (begun_probes - 1) * stride : 0;
    first += skipped;
    candidates = candidates - skipped < stride ? candidates - skipped : stride;
  }
  return first;
}

// kCount neighbouring tokens, those outside [begin, end) inactive and never read.
template <typename E, int kCount>
struct TokenGroup {
  E trainer[kCount];
  E inference[kCount];
  E advantage[kCount];
  E teacher[kCount];
  E weight[kCount];
  E entropy[kCount];
  bool active[kCount];

  // Tokens [index, index + kCount), all of which exist.
  __device__ __forceinline__ void load(const IpoLossArgs& args, int64_t index) {
    load_tokens(args.trainer_logprobs, index, trainer);
    load_tokens(args.inference_logprobs, index, inference);
    load_tokens(args.advantages, index, advantage);
    if (args.teacher_logprobs.data != nullptr) load_tokens(args.teacher_logprobs, index, teacher);
    if (args.loss_weights.data != nullptr) load_tokens(args.loss_weights, index, weight);
    if (args.entropy.data != nullptr) load_tokens(args.entropy, index, entropy);
    load_mask(args.loss_mask, index);
  }

  __device__ __forceinline__ void load_mask(const bool* mask, int64_t index) {
    if constexpr (kCount == 1) {
      active[0] = mask[index];
    } else {
      using Word = typename WordOf<kCount>::Type;
      const Word bytes = __ldg(reinterpret_cast<const Word*>(mask + index));
#pragma unroll
      for (int i = 0; i < kCount; ++i) active[i] = (bytes >> (8 * i)) & 0xffu;
    }
  }

  __device__ __forceinline__ Token<E> token(int i, const IpoLossArgs& args) const {
    return {trainer[i],
            inference[i],
            advantage[i],
            args.teacher_logprobs.data != nullptr ? teacher[i] : E(0),
            args.loss_weights.data != nullptr ? weight[i] : E(1),
            active[i],
            args.entropy.data != nullptr ? entropy[i] : E(0)};
  }
};

template <typename E>
struct TileStorage {
  BlockReduceStorage<TileSums<E>, kThreads> sums;
  bool drops_sequence;  // whether a token of the piece does
};

// Adds tokens [index, index + kCount) to the thread's sums and writes their gradients.
template <Rules kRules, typename E, int kCount>
__device__ __forceinline__ void process_tokens(const IpoLossArgs& args, const LossParams<E>& params,
                                               int64_t index, TileSums<E>& sums,
                                               TileStorage<E>& storage) {
  TokenGroup<E, kCount> group;
  group.load(args, index);
  E gradients[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Token<E> token = group.token(i, args);
    const TokenLoss<E> loss = token_loss<kRules>(token, params);
    add_token(sums, token, loss, extras_of(args));
    if constexpr (kRules == Rules::kAny) {
      if (drops_rollout(token.active, loss.log_ratio, params.rollout_low))
        storage.drops_sequence = true;
    }
    gradients[i] = loss.gradient;
  }
  if (args.gradient != nullptr) store_aligned(static_cast<E*>(args.gradient) + index, gradients);
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

// Blocks that a multiprocessor must have registers for; 0 leaves that to the compiler, which thinks
// of two. All rules in fp64 would spill.
template <Rules kRules, typename E>
constexpr int kBlocksTogether = kRules == Rules::kAny && sizeof(E) == 8 ? 1 : 0;

// One block a tile: each piece of a segment in it is summed to the piece's slot. kCount tokens a
// load where a whole group lies in the piece, else one by one. A rollout rule launches it a second
// time, for the pieces of sequences that the first has found to be dropped.
template <Rules kRules, typename E, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<kRules, E>)
    ipo_loss_tiles(const IpoLossArgs args) {
  TileStorage<E>& storage = shared_storage<TileStorage<E>>();
  const Segments& segments = args.segments;
  const LossParams<E> params =
      kRules == Rules::kAny ? gradient_params_for<E>(args) : params_for<E>(args);
  const Workspace<E> workspace(args);

  const int64_t tile = blockIdx.x;
  const int64_t tile_begin = tile * segments.tile_size;
  const int64_t tile_end = tile_begin + segments.tile_size < segments.tokens
                               ? tile_begin + segments.tile_size
                               : segments.tokens;

  double loss = 0;
  int64_t begin = tile_begin;
  for (int64_t segment = block_segment_of(segments, tile_begin);
       begin < tile_end && segment < segments.count; ++segment) {
    const int64_t segment_end = segments.begin(segment + 1);
    const int64_t end = segment_end < tile_end ? segment_end : tile_end;
    if (end <= begin) continue;
    const int64_t slot = Segments::slot(tile, segment);
    if constexpr (kRules == Rules::kAny) {
      if (params.rollout_dropped && !rollout_is_dropped(workspace, segments, segment)) {
        loss += loss_of_piece(workspace.slots[slot]);
        begin = end;
        continue;
      }
    }

    TileSums<E> sums = empty_tile_sums<E>();
    if constexpr (kRules == Rules::kAny) {
      if (threadIdx.x == 0) storage.drops_sequence = false;
      __syncthreads();
    }
    const int64_t first_group = begin - begin % kCount;
    for (int64_t index = first_group + threadIdx.x * kCount; index < end;
         index += kThreads * kCount) {
      if (index >= begin && index + kCount <= end) {
        process_tokens<kRules, E, kCount>(args, params, index, sums, storage);
      } else if constexpr (kCount > 1) {
        for (int64_t i = index < begin ? begin : index; i < index + kCount && i < end; ++i) {
          process_tokens<kRules, E, 1>(args, params, i, sums, storage);
        }
      }
    }
    sums = block_reduce<kThreads>(sums, MergeTiles(), storage.sums);
    if (threadIdx.x == 0) {
      workspace.slots[slot] = sums;
      if (kRules == Rules::kAny && params.has_rollout_rule && !params.rollout_dropped)
        workspace.rollout_flags[slot] = storage.drops_sequence;
    }
    loss += loss_of_piece(sums);
    begin = end;
  }
  if (threadIdx.x == 0) workspace.tile_losses[tile] = loss;
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

  double loss = 0;
  for (int64_t tile = threadIdx.x; tile < segments.num_tiles(); tile += kThreads)
    loss += workspace.tile_losses[tile];
  loss = block_reduce<kThreads>(loss, Add(), storage);

  const E nan = std::numeric_limits<E>::quiet_NaN();
  if (threadIdx.x == 0)
    *static_cast<E*>(args.loss) = poisoned ? nan : static_cast<E>(normalized_loss(loss, args));
  if (poisoned && args.gradient != nullptr) {
    for (int64_t i = threadIdx.x; i < segments.tokens; i += kThreads)
      static_cast<E*>(args.gradient)[i] = nan;
  }
}

template <typename E>
__device__ void finish_segment(const IpoLossArgs& args, int64_t segment,
                               BlockReduceStorage<SegmentSums, kThreads>& storage) {
  const Workspace<E> workspace(args);
  SegmentSums sums = empty_segment_sums();
  const int64_t end = args.segments.end_slot(segment);
  for (int64_t slot = args.segments.first_slot(segment) + threadIdx.x; slot < end;
       slot += kThreads) {
    sums = merge(sums, to_segment_sums(workspace.slots[slot]));
  }
  sums = block_reduce<kThreads>(sums, MergeSegments(), storage);
  if (args.params.has_rollout_rule && rollout_is_dropped(workspace, args.segments, segment))
    mark_dropped_rollout(sums);
  if (threadIdx.x == 0) store_segment<E>(args, sums, segment);
}

// Block 0 finishes the loss, block 1 + s segment s.
template <typename E>
__global__ void __launch_bounds__(kThreads) ipo_loss_finish(const IpoLossArgs args) {
  union Storage {
    BlockReduceStorage<double, kThreads> loss;
    BlockReduceStorage<SegmentSums, kThreads> segment;
  };
  Storage& storage = shared_storage<Storage>();
  if (blockIdx.x == 0) {
    finish_loss<E>(args, storage.loss);
  } else {
    finish_segment<E>(args, blockIdx.x - 1, storage.segment);
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
  using FinishStorage = BlockReduceStorage<SegmentSums, kThreads>;
  const int64_t tiles = args.segments.num_tiles();
  if (tiles > 0) {
    const auto kernel = args.params.rules() == Rules::kDefault
                            ? tiles_kernel<Rules::kDefault, E>(args)
                            : tiles_kernel<Rules::kAny, E>(args);
    cudaError_t error = launch(kernel, tiles, kThreads, sizeof(TileStorage<E>), stream, args);
    if (error == cudaSuccess && args.params.has_rollout_rule) {
      IpoLossArgs again = args;
      again.params.rollout_dropped = true;
      error = launch(kernel, tiles, kThreads, sizeof(TileStorage<E>), stream, again);
    }
    if (error != cudaSuccess) return error;
  }
  return launch(ipo_loss_finish<E>, 1 + args.segments.count, kThreads, sizeof(FinishStorage),
                stream, args);
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
