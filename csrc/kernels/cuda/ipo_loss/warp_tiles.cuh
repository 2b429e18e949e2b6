// The first launch in fp32: the gradient of every token, and the sums of every span, in one pass
// over the tokens. A warp has a tile of its own and waits for no other. Almost all tokens are tame:
// it takes 128 at a time and votes on whether they are, and goes token by token where one is not.
#pragma once

#include "kernels/cuda/ipo_loss/segments.cuh"
#include "kernels/cuda/ipo_loss/tile_sums.cuh"
#include "kernels/cuda/ipo_loss/tokens.cuh"

namespace ipo_ext::cuda {

constexpr int kTokensPerLane = kTokensPerVector<float>;
constexpr int kRoundLog2 = 7;
constexpr int kTokensPerRound = 1 << kRoundLog2;
static_assert(kTokensPerRound == kWarpSize * kTokensPerLane, "a vector for each lane");

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

// What a lane sums of a span.
struct LaneSums {
  TileSums<float> tile;
  BoundCounts<float> bounded;  // under other rules than the default alone
};

// Adds a token to the sums, but for its optional inputs.
template <Rules kRules, Tokens kTokens>
__device__ __forceinline__ TokenLoss<float> add_loss(const Token<float>& token,
                                                     const LossParams<float>& params,
                                                     LaneSums& sums) {
  const TokenLoss<float> loss = token_loss<kRules, kTokens>(token, params);
  add_token<kTokens>(sums.tile, token, loss);
  if constexpr (kRules == Rules::kAny) add_token(sums.bounded, loss);
  return loss;
}

// Takes tokens [begin, end) one by one, whatever they hold, each lane every 32nd.
template <Rules kRules, Inputs kInputs>
__device__ __forceinline__ void process_one_by_one(const IpoLossArgs& args,
                                                   const LossParams<float>& params, int begin,
                                                   int end, LaneSums& sums) {
#pragma unroll 1
  for (int i = begin + threadIdx.x % kWarpSize; i < end; i += kWarpSize) {
    TokenVector<float, 1, kInputs> vector;
    vector.load(args, i);
    vector.widen(args);
    const Token<float> token = vector.token(0);
    const TokenLoss<float> loss = add_loss<kRules, Tokens::kAny>(token, params, sums);
    add_extras(sums.tile, token, loss.active & loss.finite, extras_of<kInputs>(args));
    if (args.gradient != nullptr) static_cast<float*>(args.gradient)[i] = loss.gradient;
  }
}

// Returns whether all tokens of the warp's vectors are tame.
template <Inputs kInputs>
__device__ __forceinline__ bool are_tame(
    const TokenVector<float, kTokensPerLane, kInputs>& vector) {
  bool tame = true;
#pragma unroll
  for (int i = 0; i < kTokensPerLane; ++i)
    tame &= fabsf(log_ratio<Tokens::kTame>(vector.token(i))) <= static_cast<float>(kTame);
  return __all_sync(kFullWarp, tame);
}

// Adds what the optional inputs of a vector of tame tokens are measured by. One branch for all of
// them: where there are none, nothing is selected or added.
template <Inputs kInputs>
__device__ __forceinline__ void add_extras_of(
    const TokenVector<float, kTokensPerLane, kInputs>& vector, const TokenExtras& has,
    TileSums<float>& sums) {
  if (!has.teacher && !has.entropy) return;
#pragma unroll
  for (int i = 0; i < kTokensPerLane; ++i) add_extras(sums, vector.token(i), vector.active(i), has);
}

// Takes the round of tokens that begins at `begin` if all of them are tame; else returns false.
// Vectors must be aligned.
template <Rules kRules, Inputs kInputs>
__device__ __forceinline__ bool process_tame_round(const IpoLossArgs& args,
                                                   const LossParams<float>& params, int begin,
                                                   LaneSums& sums) {
  const int index = begin + threadIdx.x % kWarpSize * kTokensPerLane;
  TokenVector<float, kTokensPerLane, kInputs> vector;
  vector.load(args, index);
  vector.widen(args);
  if (!are_tame(vector)) return false;
  float gradients[kTokensPerLane];
#pragma unroll
  for (int i = 0; i < kTokensPerLane; ++i)
    gradients[i] = add_loss<kRules, Tokens::kTame>(vector.token(i), params, sums).gradient;
  add_extras_of(vector, extras_of<kInputs>(args), sums.tile);
  if (args.gradient != nullptr)
    store_aligned(static_cast<float*>(args.gradient) + index, gradients);
  return true;
}

// Sums tokens [begin, end) of the tile over the lanes. A round that the span does not fill goes
// token by token.
template <Rules kRules, Inputs kInputs>
__device__ __forceinline__ LaneSums sum_span_of_tile(const IpoLossArgs& args,
                                                     const LossParams<float>& params, int begin,
                                                     int end, bool may_be_tame) {
  LaneSums sums = {empty_tile_sums<float>(), {}};
  int tame_end = may_be_tame ? end : begin;
  keep_in_register(tame_end);
#pragma unroll 1
  for (int round = begin & -kTokensPerRound; round < end; round += kTokensPerRound) {
    const int round_end = round + kTokensPerRound;
    if (round >= begin && round_end <= tame_end &&
        process_tame_round<kRules, kInputs>(args, params, round, sums))
      continue;
    process_one_by_one<kRules, kInputs>(args, params, round > begin ? round : begin,
                                        round_end < end ? round_end : end, sums);
  }
  return sums;
}

// Stores the warp's sums of a span to its slot and returns what the span adds to the loss, valid in
// all lanes.
template <Rules kRules>
__device__ __forceinline__ double store_span(const LaneSums& sums,
                                             const Workspace<float>& workspace, int64_t slot) {
  if constexpr (kRules == Rules::kAny) {
    const BoundCounts<float> bounded = warp_reduce(sums.bounded, MergeBoundCounts());
    if (threadIdx.x % kWarpSize == 0) workspace.bound_counts[slot] = bounded;
  }
  return warp_reduce_to(sums.tile, workspace.slots[slot]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

// The blocks that a multiprocessor must have registers for.
template <Rules kRules, Inputs kInputs>
constexpr int kWarpTileBlocks = kRules == Rules::kDefault && kInputs == Inputs::kPlain ? 3 : 2;

// The settings come in fp32 beside the others: converted here, they would be in every round.
struct WarpTilesArgs {
  IpoLossArgs loss;
  LossParams<float> params;  // without the normalizer
};

// kMaskRule and kForm are those of the settings, or kCount, which has them chosen at run time.
template <Rules kRules, Inputs kInputs, MaskRule kMaskRule = MaskRule::kCount,
          PolicyForm kForm = PolicyForm::kCount>
__global__ void __launch_bounds__(kThreads, kWarpTileBlocks<kRules, kInputs>)
    ipo_loss_warp_tiles(const WarpTilesArgs all) {
  const Segments& segments = all.loss.segments;
  pdl_trigger();
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarpSize;
  const int64_t tile_begin = tile * segments.tile_size();
  if (tile_begin >= segments.tokens) return;
  const int64_t left = segments.tokens - tile_begin;
  const int size = static_cast<int>(left < segments.tile_size() ? left : segments.tile_size());

  LossParams<float> params = all.params;
  params.inv_normalizer = inverse_normalizer_of_tokens<float>(all.loss);
  // What is known here is known to the compiler.
  if constexpr (kInputs == Inputs::kPlain) params.teacher_tau = 0;
  if constexpr (kMaskRule != MaskRule::kCount) params.mask_rule = kMaskRule;
  if constexpr (kForm != PolicyForm::kCount) params.pg_form = kForm;
  const bool may_be_tame =
      vectorizable<kInputs>(all.loss) && params.adv_tau != 0 && params.inv_normalizer != 0;
  const IpoLossArgs args = args_from<kInputs>(all.loss, tile_begin);
  const Workspace<float> workspace(all.loss);
  double loss = 0;
  int begin = 0;
  for (int64_t segment = warp_segment_of(segments, tile_begin);
       begin < size && segment < segments.count; ++segment) {
    const int64_t segment_end = segments.begin(segment + 1) - tile_begin;
    const int end = segment_end < size ? static_cast<int>(segment_end) : size;
    if (end <= begin) continue;
    if constexpr (kRules == Rules::kAny) {
      if (params.judges_sequences) params.sequence = workspace.verdicts[segment];
    }
    const LaneSums sums = sum_span_of_tile<kRules, kInputs>(args, params, begin, end, may_be_tame);
    loss += store_span<kRules>(sums, workspace, Segments::slot(tile, segment));
    begin = end;
  }
  if (threadIdx.x % kWarpSize == 0) workspace.tile_losses[tile] = loss;
}

}  // namespace ipo_ext::cuda
