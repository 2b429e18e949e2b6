// The loss from log-probabilities on the CPU, one span of tokens: a SIMD loop over the token math.
// Compiled once for each instruction set (IPO_EXT_CPU_ARCH names it), chosen at run time in
// ipo_loss.cpp; ragged tails run the same vector code, padded with inactive tokens.
#include "kernels/cpu/ipo_loss_simd.h"

#include "kernels/cpu/token_chunks.h"

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

using namespace ipo_ext::math;

#define IPO_EXT_POINTER(member, ...) const E* member;
#define IPO_EXT_STAGED(member, ...) alignas(64) E member[kChunk];
#define IPO_EXT_STAGE_OPTIONAL(member, tensor, absent) \
  chunk.member = stage<E>(args.tensor, kConstant<E, absent>, begin, count, staging.member);
#define IPO_EXT_STAGE_REQUIRED(member, tensor) IPO_EXT_STAGE_OPTIONAL(member, tensor, 0)
#define IPO_EXT_LOAD(member, ...) load<T>(chunk.member + i),

// Neighbouring tokens in the compute dtype, padded with inactive ones to whole vectors: the
// caller's memory where it can be used as it is, else staged copies.
template <typename E>
struct Chunk {
  const E* trainer_logprob;  // [padded count], as all of these
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_POINTER, IPO_EXT_POINTER)
  const E* entropy;
  const uint8_t* active;
  E* gradient;
};

template <typename E>
struct Staging {
  alignas(64) E trainer_logprob[kChunk];
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_STAGED, IPO_EXT_STAGED)
  alignas(64) E entropy[kChunk];
  alignas(64) E gradient[kChunk];
  alignas(64) uint8_t active[64];
};

template <typename E>
inline __attribute__((always_inline)) Chunk<E> stage_chunk(const IpoLossArgs& args, int64_t begin,
                                                           int64_t count, Staging<E>& staging) {
  Chunk<E> chunk;
  IPO_EXT_STAGE_OPTIONAL(trainer_logprob, trainer_logprobs, 0)
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_STAGE_REQUIRED, IPO_EXT_STAGE_OPTIONAL)
  IPO_EXT_STAGE_OPTIONAL(entropy, entropy, 0)
  chunk.active = stage_mask<E>(args.loss_mask, begin, count, staging.active);
  chunk.gradient = static_cast<E*>(args.gradient) + begin;
  if (is_ragged<E>(count) || args.gradient == nullptr) chunk.gradient = staging.gradient;
  return chunk;
}

// Copies row by row: assigned as a whole, the sums would live in memory instead of registers.
template <typename T>
inline __attribute__((always_inline)) void copy_sums(const TileSums<T>& from, TileSums<T>& to) {
  for (int row = 0; row < sum::kNumRows; ++row) to.sums[row] = from.sums[row];
  for (int row = 0; row < count::kNumRows; ++row) to.counts[row] = from.counts[row];
  to.log_ratio_min = from.log_ratio_min;
  to.log_ratio_max = from.log_ratio_max;
}

template <Rules kRules, typename E>
inline __attribute__((always_inline)) void add_chunk(const Chunk<E>& chunk, int64_t count,
                                                     const LossParams<E>& shared_params,
                                                     const TokenExtras& has,
                                                     TileSums<Vector<E>>& tile,
                                                     BoundCounts<Vector<E>>& bounded) {
  using T = Vector<E>;
  // These are copies: the gradient's stores could change the caller's, and every token would reload
  // them.
  const LossParams<E> params = shared_params;
  // Exponentials have a loop of their own, short enough for the processor to overlap the long
  // chains of dependent operations of several vectors.
  alignas(64) E ratios[kChunk], mismatches[kChunk];
  for (int64_t i = 0; i < count; i += kLanes<E>) {
    const Exponential<T> each =
        exponential(load<T>(chunk.trainer_logprob + i) - load<T>(chunk.inference_logprob + i));
    store(ratios + i, each.exp);
    store(mismatches + i, each.exp_minus_1_minus_x);
  }
  TileSums<T> sums;
  copy_sums(tile, sums);
  for (int64_t i = 0; i < count; i += kLanes<E>) {
    const Token<T> token = {load<T>(chunk.trainer_logprob + i),
                            IPO_EXT_TOKEN_INPUTS(IPO_EXT_LOAD, IPO_EXT_LOAD)
                                load_mask<T>(chunk.active + i),
                            load<T>(chunk.entropy + i)};
    const TokenLoss<T> loss =
        token_loss<kRules, T>(token, {load<T>(ratios + i), load<T>(mismatches + i)}, params);
    store(chunk.gradient + i, loss.gradient);
    add_token(sums, token, loss);
    add_extras(sums, token, loss.active & loss.finite, has);
    if constexpr (kRules == Rules::kAny) add_token(bounded, loss);
  }
  copy_sums(sums, tile);
}

#undef IPO_EXT_LOAD
#undef IPO_EXT_STAGE_REQUIRED
#undef IPO_EXT_STAGE_OPTIONAL
#undef IPO_EXT_STAGED
#undef IPO_EXT_POINTER

// Adds the lanes of a vector of sums in order.
template <typename E>
inline __attribute__((always_inline)) TileSums<E> merge_lanes(const TileSums<Vector<E>>& vector) {
  TileSums<E> total = empty_tile_sums<E>();
  double sums[sum::kNumRows][kLanes<E>];
  memcpy(sums, vector.sums, sizeof(sums));
  for (int lane = 0; lane < kLanes<E>; ++lane) {
    for (int row = 0; row < sum::kNumRows; ++row) total.sums[row] += sums[row][lane];
    for (int row = 0; row < count::kNumRows; ++row) {
      total.counts[row] += static_cast<uint32_t>(vector.counts[row][lane]);
    }
    total.log_ratio_min = smaller(total.log_ratio_min, static_cast<E>(vector.log_ratio_min[lane]));
    total.log_ratio_max = larger(total.log_ratio_max, static_cast<E>(vector.log_ratio_max[lane]));
  }
  return total;
}

template <Rules kRules, typename E>
inline __attribute__((always_inline)) TileSums<E> span_sums(const IpoLossArgs& args,
                                                            const LossParams<E>& params,
                                                            int64_t begin, int64_t end,
                                                            BoundCounts<E>& bounded) {
  Staging<E> staging;
  TileSums<Vector<E>> tile = empty_tile_sums<Vector<E>>();
  BoundCounts<Vector<E>> bounded_lanes = {};
  const TokenExtras has = extras_of(args);
  for (int64_t first = begin; first < end;) {
    const int64_t count = chunk_tokens<E>(end - first);
    const Chunk<E> chunk = stage_chunk<E>(args, first, count, staging);
    add_chunk<kRules, E>(chunk, count, params, has, tile, bounded_lanes);
    if (args.gradient != nullptr && chunk.gradient == staging.gradient) {
      memcpy(static_cast<E*>(args.gradient) + first, staging.gradient, count * sizeof(E));
    }
    first += count;
  }
  for (int lane = 0; lane < kLanes<E>; ++lane) {
    bounded.clipped += static_cast<uint32_t>(bounded_lanes.clipped[lane]);
    bounded.capped += static_cast<uint32_t>(bounded_lanes.capped[lane]);
  }
  return merge_lanes<E>(tile);
}

}  // namespace

#define IPO_EXT_DEFINE_SPAN_SUMS(name, kRules, E)                                       \
  TileSums<E> name(const IpoLossArgs& args, const LossParams<E>& params, int64_t begin, \
                   int64_t end, BoundCounts<E>& bounded) {                              \
    return span_sums<kRules, E>(args, params, begin, end, bounded);                     \
  }
IPO_EXT_SPAN_SUMS(IPO_EXT_DEFINE_SPAN_SUMS)
#undef IPO_EXT_DEFINE_SPAN_SUMS

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
