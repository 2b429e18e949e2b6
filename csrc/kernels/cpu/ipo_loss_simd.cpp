// The loss from log-probabilities on the CPU, one span of tokens: a SIMD loop over the token math.
// Compiled once for each instruction set (IPO_EXT_CPU_ARCH names it), chosen at run time in
// ipo_loss.cpp; ragged tails run the same vector code, padded with inactive tokens.
#include "kernels/cpu/ipo_loss_simd.h"

#include <type_traits>

#include "kernels/cpu/simd_memory.h"

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

using namespace ipo_ext::math;

constexpr int64_t kChunk = 1024;  // tokens staged at once; a multiple of every vector's lanes

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

// What stands for an absent tensor.
template <typename E>
struct Constant {
  alignas(64) E values[kChunk];
  constexpr explicit Constant(E value) : values() {
    for (E& each : values) each = value;
  }
};
template <typename E, int kValue>
constexpr Constant<E> kConstant(kValue);

template <typename E>
constexpr int64_t kLanes = kLanesOf<Vector<E>>;

template <typename E>
inline __attribute__((always_inline)) bool is_ragged(int64_t count) {
  return count % kLanes<E> != 0;
}

// Returns the tokens of the next chunk: as many whole vectors as there are, then the ragged tail.
template <typename E>
inline __attribute__((always_inline)) int64_t chunk_tokens(int64_t left) {
  if (left >= kChunk) return kChunk;
  return left < kLanes<E> ? left : left - left % kLanes<E>;
}

template <typename E, typename Stored>
inline __attribute__((always_inline)) void convert_tokens(const void* data, int64_t begin,
                                                          int64_t count, E* out) {
  const Stored* tokens = static_cast<const Stored*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = convert<E>(tokens[i]);
  for (int64_t i = count; i < count + kLanes<E> && is_ragged<E>(i); ++i) out[i] = 0;
}

// Returns tokens [begin, begin + count) as E, padded to whole vectors.
template <typename E>
inline __attribute__((always_inline)) const E* stage(TokenInput input, const Constant<E>& absent,
                                                     int64_t begin, int64_t count, E* staged) {
  if (input.data == nullptr) return absent.values;
  return dispatch_floating(input.dtype, [&](auto stored) -> const E* {
    using Stored = TypeOf<decltype(stored)>;
    if constexpr (std::is_same_v<Stored, E>) {
      if (!is_ragged<E>(count)) return static_cast<const E*>(input.data) + begin;
    }
    convert_tokens<E, Stored>(input.data, begin, count, staged);
    return staged;
  });
}

template <typename E>
inline __attribute__((always_inline)) Chunk<E> stage_chunk(const IpoLossArgs& args, int64_t begin,
                                                           int64_t count, Staging<E>& staging) {
  Chunk<E> chunk;
  IPO_EXT_STAGE_OPTIONAL(trainer_logprob, trainer_logprobs, 0)
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_STAGE_REQUIRED, IPO_EXT_STAGE_OPTIONAL)
  IPO_EXT_STAGE_OPTIONAL(entropy, entropy, 0)
  chunk.active = args.loss_mask + begin;
  chunk.gradient = static_cast<E*>(args.gradient) + begin;
  if (is_ragged<E>(count)) {
    for (int64_t i = 0; i < kLanes<E>; ++i) {
      staging.active[i] = i < count && args.loss_mask[begin + i] != 0;
    }
    chunk.active = staging.active;
  }
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
                                                     Mask<Vector<E>>& drop_sequence) {
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
    add_token(sums, token, loss, has);
    if constexpr (kRules == Rules::kAny)
      drop_sequence |= drops_rollout<T>(token.active, loss.log_ratio, params.rollout_low);
  }
  copy_sums(sums, tile);
}

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
                                                            bool& drops_sequence) {
  Staging<E> staging;
  TileSums<Vector<E>> tile = empty_tile_sums<Vector<E>>();
  Mask<Vector<E>> drop_sequence = {};
  const TokenExtras has = extras_of(args);
  for (int64_t first = begin; first < end;) {
    const int64_t count = chunk_tokens<E>(end - first);
    const Chunk<E> chunk = stage_chunk<E>(args, first, count, staging);
    add_chunk<kRules, E>(chunk, count, params, has, tile, drop_sequence);
    if (args.gradient != nullptr && chunk.gradient == staging.gradient) {
      memcpy(static_cast<E*>(args.gradient) + first, staging.gradient, count * sizeof(E));
    }
    first += count;
  }
  for (int lane = 0; lane < kLanes<E>; ++lane) drops_sequence |= drop_sequence[lane] != 0;
  return merge_lanes<E>(tile);
}

}  // namespace

#define IPO_EXT_DEFINE_SPAN_SUMS(name, kRules, E)                                       \
  TileSums<E> name(const IpoLossArgs& args, const LossParams<E>& params, int64_t begin, \
                   int64_t end, bool& drops_sequence) {                                 \
    return span_sums<kRules, E>(args, params, begin, end, drops_sequence);              \
  }
IPO_EXT_SPAN_SUMS(IPO_EXT_DEFINE_SPAN_SUMS)
#undef IPO_EXT_DEFINE_SPAN_SUMS

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
