// Tier 1 on the CPU, one tile of tokens: a SIMD loop over the token math. Compiled once for each
// instruction set (IPO_EXT_CPU_ARCH names it), chosen at run time in ipo_loss.cpp; ragged tails run
// the same vector code, padded with inactive tokens.
#include "kernels/cpu/ipo_loss_simd.h"

#include "kernels/cpu/simd_memory.h"

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

using namespace ipo_ext::math;

constexpr int64_t kChunk = 256;  // tokens staged at once; a multiple of every vector's lanes

// One chunk of a tile, in the compute dtype: the caller's memory where it can be used as it is,
// else `staged` copies.
template <typename E>
struct Chunk {
  const E* trainer;  // [kChunk], like the rest
  const E* inference;
  const E* advantage;
  const E* teacher;
  const E* weight;
  const E* entropy;
  const bool* active;
  E* gradient;
};

template <typename E>
struct Staging {
  alignas(64) E trainer[kChunk];
  alignas(64) E inference[kChunk];
  alignas(64) E advantage[kChunk];
  alignas(64) E teacher[kChunk];
  alignas(64) E weight[kChunk];
  alignas(64) E entropy[kChunk];
  alignas(64) E gradient[kChunk];
  alignas(64) bool active[kChunk];
};

template <typename E>
constexpr DType kDTypeOf = sizeof(E) == sizeof(float) ? DType::kFloat32 : DType::kFloat64;

template <typename E, typename Stored>
inline __attribute__((always_inline)) void convert_tokens(const void* data, int64_t begin,
                                                          int64_t count, E* out) {
  const Stored* tokens = static_cast<const Stored*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = convert<E>(tokens[i]);
}

// Tokens [begin, begin + count) as E, at least kChunk of them readable; `absent` in every lane of
// an absent tensor.
template <typename E>
inline __attribute__((always_inline)) const E* stage(TokenInput input, E absent, int64_t begin,
                                                     int64_t count, E* staged) {
  if (input.data == nullptr) {
    for (int64_t i = 0; i < kChunk; ++i) staged[i] = absent;
    return staged;
  }
  if (input.dtype == kDTypeOf<E> && count == kChunk)
    return static_cast<const E*>(input.data) + begin;
  switch (input.dtype) {
    case DType::kFloat16:
      convert_tokens<E, Float16>(input.data, begin, count, staged);
      break;
    case DType::kBFloat16:
      convert_tokens<E, BFloat16>(input.data, begin, count, staged);
      break;
    case DType::kFloat64:
      convert_tokens<E, double>(input.data, begin, count, staged);
      break;
    default:
      convert_tokens<E, float>(input.data, begin, count, staged);
  }
  for (int64_t i = count; i < kChunk; ++i) staged[i] = absent;
  return staged;
}

template <typename E>
inline __attribute__((always_inline)) Chunk<E> stage_chunk(const IpoLossArgs& args, int64_t begin,
                                                           int64_t count, Staging<E>& staging) {
  Chunk<E> chunk;
  chunk.trainer = stage<E>(args.trainer_logprobs, 0, begin, count, staging.trainer);
  chunk.inference = stage<E>(args.inference_logprobs, 0, begin, count, staging.inference);
  chunk.advantage = stage<E>(args.advantages, 0, begin, count, staging.advantage);
  chunk.teacher = stage<E>(args.teacher_logprobs, 0, begin, count, staging.teacher);
  chunk.weight = stage<E>(args.loss_weights, 1, begin, count, staging.weight);
  chunk.entropy = stage<E>(args.entropy, 0, begin, count, staging.entropy);
  chunk.active = args.loss_mask + begin;
  chunk.gradient = static_cast<E*>(args.gradient) + begin;
  if (count < kChunk) {
    for (int64_t i = 0; i < kChunk; ++i) staging.active[i] = i < count && args.loss_mask[begin + i];
    chunk.active = staging.active;
  }
  if (count < kChunk || args.gradient == nullptr) chunk.gradient = staging.gradient;
  return chunk;
}

// Bytes 0 and 1 to masks 0 and -1.
template <typename T>
inline __attribute__((always_inline)) Mask<T> load_mask(const bool* tokens) {
  constexpr int kLanes = sizeof(T) / sizeof(Element<T>);
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  memcpy(&bytes, tokens, sizeof(bytes));
  return -__builtin_convertvector(bytes, Mask<T>);
}

template <typename E>
inline __attribute__((always_inline)) void add_chunk(const Chunk<E>& chunk,
                                                     const LossParams<E>& params,
                                                     const TokenExtras& has,
                                                     TileSums<Vector<E>>& tile) {
  using T = Vector<E>;
  constexpr int kLanes = sizeof(T) / sizeof(E);
  TileSums<T> sums = tile;
  for (int64_t i = 0; i < kChunk; i += kLanes) {
    const Token<T> token = {load<T>(chunk.trainer + i),   load<T>(chunk.inference + i),
                            load<T>(chunk.advantage + i), load<T>(chunk.teacher + i),
                            load<T>(chunk.weight + i),    load_mask<T>(chunk.active + i),
                            load<T>(chunk.entropy + i)};
    const TokenLoss<T> loss = token_loss(token, params);
    store(chunk.gradient + i, loss.gradient);
    add_token(sums, token, loss, has);
  }
  tile = sums;
}

// The lanes of a vector of tile sums, added in order.
template <typename E>
inline __attribute__((always_inline)) TileSums<E> merge_lanes(const TileSums<Vector<E>>& vector) {
  using T = Vector<E>;
  constexpr int kLanes = sizeof(T) / sizeof(E);
  TileSums<E> total = empty_tile_sums<E>();
  double sums[sum::kNumRows][kLanes];
  memcpy(sums, vector.sums, sizeof(sums));
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int row = 0; row < sum::kNumRows; ++row) total.sums[row] += sums[row][lane];
    for (int row = 0; row < count::kNumRows; ++row) {
      total.counts[row] += static_cast<uint32_t>(vector.counts[row][lane]);
    }
    total.log_ratio_min = smaller(total.log_ratio_min, static_cast<E>(vector.log_ratio_min[lane]));
    total.log_ratio_max = larger(total.log_ratio_max, static_cast<E>(vector.log_ratio_max[lane]));
  }
  return total;
}

template <typename E>
inline __attribute__((always_inline)) TileSums<E> piece_sums(const IpoLossArgs& args,
                                                             const LossParams<E>& params,
                                                             int64_t begin, int64_t end) {
  Staging<E> staging;
  TileSums<Vector<E>> tile = empty_tile_sums<Vector<E>>();
  const TokenExtras has = extras_of(args);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    const Chunk<E> chunk = stage_chunk<E>(args, first, count, staging);
    add_chunk<E>(chunk, params, has, tile);
    if (args.gradient != nullptr && chunk.gradient == staging.gradient) {
      memcpy(static_cast<E*>(args.gradient) + first, staging.gradient, count * sizeof(E));
    }
  }
  return merge_lanes<E>(tile);
}

}  // namespace

TileSums<float> piece_sums_f32(const IpoLossArgs& args, const LossParams<float>& params,
                               int64_t begin, int64_t end) {
  return piece_sums<float>(args, params, begin, end);
}

TileSums<double> piece_sums_f64(const IpoLossArgs& args, const LossParams<double>& params,
                                int64_t begin, int64_t end) {
  return piece_sums<double>(args, params, begin, end);
}

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
