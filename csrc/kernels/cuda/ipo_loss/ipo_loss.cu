// Launches the loss from log-probabilities: gradients and sums in one pass over the tokens, then
// one small launch for the loss and the metrics of every packed sequence; where sequences are
// judged, after a pass over the log-ratios that says which tokens pay. There are no atomics, no
// synchronisation with the host and no memory but the caller's; results are bitwise equal run to
// run on any GPU, because tiles depend on the number of tokens alone.
#include "kernels/cuda/ipo_loss/components.cuh"
#include "kernels/cuda/ipo_loss/finish.cuh"
#include "kernels/cuda/ipo_loss/sequences.cuh"
#include "kernels/cuda/ipo_loss/tiles.cuh"
#include "kernels/cuda/ipo_loss/warp_tiles.cuh"
#include "kernels/ipo_loss.h"

namespace ipo_ext::cuda {
namespace {

template <typename E>
__global__ void __launch_bounds__(kThreads) metric_means_kernel(const MetricMeansArgs args) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s < args.segments) metric_means_of_segment<E>(args, s);
}

// A thread makes an element of the folded rows: the segments' values in their order, so that the
// bits are the same in every run.
__global__ void __launch_bounds__(kThreads) fold_segments_kernel(const FoldArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.num_rows() * args.sequences) return;
  const FoldedRow row = folded_row(args, static_cast<int>(index / args.sequences));
  const int64_t sequence = index % args.sequences;
  double folded = row.nothing();
  for (int64_t s = 0; s < args.segments; ++s)
    if (args.sequence_ids[s] == sequence) folded = row.combine(folded, row.values[s]);
  row.folded[sequence] = folded;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

// Returns whether a warp takes a tile, not a block.
bool has_warp_tiles(const IpoLossArgs& args) {
  return args.compute_dtype == DType::kFloat32 && !args.components.are_wanted();
}

// Fills in the tokens of a tile. Small batches get one vector for each thread, to spread over the
// multiprocessors; large ones a number of tiles that does not grow, so that the second launch stays
// small. Counts of a tile fit 32 bits by far.
Segments with_tiles(const IpoLossArgs& args) {
  const bool by_warps = has_warp_tiles(args);
  const int64_t most_tiles = by_warps ? 8192 : 2048;
  Segments segments = args.segments;
  segments.tile_log2 = by_warps ? kRoundLog2 : kBlockTileLog2;
  while (segments.tile_size() * most_tiles < segments.tokens) ++segments.tile_log2;
  return segments;
}

// Returns whether a token has nothing but the required inputs, in fp32.
bool is_plain(const IpoLossArgs& args) {
#define IPO_EXT_IS_FP32(member, tensor) &&args.tensor.dtype == DType::kFloat32
#define IPO_EXT_IS_ABSENT(member, tensor, absent) &&args.tensor.data == nullptr
  return args.trainer_logprobs.dtype == DType::kFloat32 && args.entropy.data == nullptr &&
         args.params.teacher_tau == 0 IPO_EXT_TOKEN_INPUTS(IPO_EXT_IS_FP32, IPO_EXT_IS_ABSENT);
#undef IPO_EXT_IS_ABSENT
#undef IPO_EXT_IS_FP32
}

int64_t blocks_of_warps(int64_t warps) { return (warps + kWarpsOfBlock - 1) / kWarpsOfBlock; }
int64_t blocks_of_threads(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

using WarpTilesKernel = void (*)(WarpTilesArgs);

// Returns the kernel of a mask rule and a policy form that presets combine, the one that chooses
// them at run time for others.
WarpTilesKernel plain_kernel(MaskRule mask_rule, PolicyForm form) {
#define IPO_EXT_KERNEL(kMaskRule, kForm)                             \
  if (mask_rule == MaskRule::kMaskRule && form == PolicyForm::kForm) \
    return ipo_loss_warp_tiles<Rules::kAny, Inputs::kPlain, MaskRule::kMaskRule, PolicyForm::kForm>;
  IPO_EXT_KERNEL(kRatio, kRatio)
  IPO_EXT_KERNEL(kProbDiff, kCapped)
  IPO_EXT_KERNEL(kNone, kPpoClip)
  IPO_EXT_KERNEL(kNone, kCispo)
#undef IPO_EXT_KERNEL
  return ipo_loss_warp_tiles<Rules::kAny, Inputs::kAny>;
}

WarpTilesKernel warp_tiles_kernel(const IpoLossArgs& args) {
  const bool plain = is_plain(args);
  if (args.params.rules() == Rules::kDefault) {
    return plain ? ipo_loss_warp_tiles<Rules::kDefault, Inputs::kPlain>
                 : ipo_loss_warp_tiles<Rules::kDefault, Inputs::kAny>;
  }
  return plain ? plain_kernel(args.params.mask_rule, args.params.pg_form)
               : ipo_loss_warp_tiles<Rules::kAny, Inputs::kAny>;
}

cudaError_t launch_warp_tiles(const IpoLossArgs& args, cudaStream_t stream) {
  const WarpTilesArgs all = {args, settings_for<float>(args.params)};
  return launch(warp_tiles_kernel(args), blocks_of_warps(args.segments.num_tiles()), kThreads, 0,
                stream, all);
}

template <Rules kRules, typename E>
auto tiles_kernel(const IpoLossArgs& args) {
  return vectorizable(args) ? ipo_loss_tiles<kRules, E, kTokensPerVector<E>>
                            : ipo_loss_tiles<kRules, E, 1>;
}

cudaError_t launch_block_tiles(const IpoLossArgs& args, cudaStream_t stream) {
  const auto kernel = args.params.rules() == Rules::kDefault
                          ? tiles_kernel<Rules::kDefault, double>(args)
                          : tiles_kernel<Rules::kAny, double>(args);
  return launch(kernel, args.segments.num_tiles(), kThreads, sizeof(TileStorage<double>), stream,
                args);
}

template <typename E>
cudaError_t launch_tiles(const IpoLossArgs& args, cudaStream_t stream) {
  if (args.components.are_wanted()) {
    return launch(ipo_loss_tiles_with_components<E>, args.segments.num_tiles(), kThreads,
                  sizeof(ComponentStorage<E>), stream, args);
  }
  return has_warp_tiles(args) ? launch_warp_tiles(args, stream) : launch_block_tiles(args, stream);
}

template <typename E>
cudaError_t launch_sum_sequences(const IpoLossArgs& args, cudaStream_t stream) {
  const int64_t tiles = judged_segments(args.segments).num_tiles();
  if (tiles == 0) return cudaSuccess;
  return launch(ipo_loss_sum_sequences<E>, blocks_of_warps(tiles), kThreads, 0, stream, args);
}

// Launches nothing where no sequence is judged. Sequences without tokens have verdicts too.
template <typename E>
cudaError_t launch_verdicts(const IpoLossArgs& args, cudaStream_t stream) {
  const int64_t count = args.segments.count;
  if (!args.params.judges_sequences || count == 0) return cudaSuccess;
  if (args.sequence_totals != nullptr) {
    return launch(ipo_loss_judge_pieces<E>, blocks_of_threads(count), kThreads, 0, stream, args);
  }
  const cudaError_t error = launch_sum_sequences<E>(args, stream);
  if (error != cudaSuccess) return error;
  return launch(ipo_loss_judge_sequences<E>, blocks_of_warps(count), kThreads, 0, stream, args);
}

template <typename E>
cudaError_t launch_statistics(const SequenceStatisticsArgs& args, cudaStream_t stream) {
  const int64_t count = args.loss.segments.count;
  if (count == 0) return cudaSuccess;
  const cudaError_t error = launch_sum_sequences<E>(args.loss, stream);
  if (error != cudaSuccess) return error;
  return launch(ipo_loss_store_statistics<E>, blocks_of_warps(count), kThreads, 0, stream, args);
}

template <typename E, bool kHasComponents>
cudaError_t launch_finish(const IpoLossArgs& args, bool may_overlap, cudaStream_t stream) {
  static const bool can_overlap = supports_pdl(ipo_loss_finish<E, kHasComponents>);
  const int64_t count = args.segments.count;
  const int64_t per_block = segments_per_block(count);
  const int64_t blocks = 1 + (count > 0 ? (count + per_block - 1) / per_block : 0);
  // Nothing but the tiles may still be under way.
  return launch_pdl(ipo_loss_finish<E, kHasComponents>, blocks, kFinishThreads,
                    sizeof(FinishStorage), stream, args, can_overlap && may_overlap);
}

template <typename E>
cudaError_t launch_ipo_loss(const IpoLossArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t unknown = current_device(device);
  if (unknown != cudaSuccess) return unknown;
  const cudaError_t not_judged = launch_verdicts<E>(args, stream);
  if (not_judged != cudaSuccess) return not_judged;
  const int64_t tiles = args.segments.num_tiles();
  if (tiles > 0) {
    const cudaError_t error = launch_tiles<E>(args, stream);
    if (error != cudaSuccess) return error;
  }
  const bool may_overlap = device.capability >= 90 && tiles > 0;
  return args.components.are_wanted() ? launch_finish<E, true>(args, may_overlap, stream)
                                      : launch_finish<E, false>(args, may_overlap, stream);
}

}  // namespace

size_t workspace_bytes(const IpoLossArgs& args) {
  const Segments segments = with_tiles(args);
  return dispatch_compute(args.compute_dtype, [&](auto compute) {
    return Workspace<TypeOf<decltype(compute)>>::bytes(args, segments, judged_segments(segments));
  });
}

const char* ipo_loss(IpoLossArgs args, CUstream_st* stream) {
  args.segments = with_tiles(args);
  return error_text(dispatch_compute(args.compute_dtype, [&](auto compute) {
    return launch_ipo_loss<TypeOf<decltype(compute)>>(args, stream);
  }));
}

const char* sequence_statistics(SequenceStatisticsArgs args, CUstream_st* stream) {
  args.loss.segments = with_tiles(args.loss);
  return error_text(dispatch_compute(args.loss.compute_dtype, [&](auto compute) {
    return launch_statistics<TypeOf<decltype(compute)>>(args, stream);
  }));
}

const char* fold_segments(const FoldArgs& args, CUstream_st* stream) {
  if (args.sequences == 0) return nullptr;
  const int64_t blocks = blocks_of_threads(args.num_rows() * args.sequences);
  return error_text(launch(fold_segments_kernel, blocks, kThreads, 0, stream, args));
}

const char* metric_means(const MetricMeansArgs& args, CUstream_st* stream) {
  if (args.segments == 0) return nullptr;
  const int64_t blocks = blocks_of_threads(args.segments);
  return error_text(dispatch_compute(args.compute_dtype, [&](auto compute) {
    return launch(metric_means_kernel<TypeOf<decltype(compute)>>, blocks, kThreads, 0, stream,
                  args);
  }));
}

}  // namespace ipo_ext::cuda
