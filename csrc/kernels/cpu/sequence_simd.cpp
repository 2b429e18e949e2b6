// What rules on sequences look at, on the CPU, of one span of tokens: a SIMD loop over the
// log-ratios. Compiled once for each instruction set (IPO_EXT_CPU_ARCH names it), chosen at run
// time in ipo_loss.cpp.
#include "kernels/cpu/ipo_loss_simd.h"
#include "kernels/cpu/token_chunks.h"

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

using namespace ipo_ext::math;

template <typename E>
struct SequenceStaging {
  alignas(64) E trainer_logprob[kChunk];
  alignas(64) E inference_logprob[kChunk];
  alignas(64) E advantage[kChunk];
  alignas(64) uint8_t active[64];
};

template <typename E>
inline __attribute__((always_inline)) void add_chunk(const IpoLossArgs& args, int64_t begin,
                                                     int64_t count, const WantedSums& wanted,
                                                     SequenceStaging<E>& staging,
                                                     SequenceSums<Vector<E>>& sequence) {
  using T = Vector<E>;
  const Constant<E>& absent = kConstant<E, 0>;
  const E* trainer = stage<E>(args.trainer_logprobs, absent, begin, count, staging.trainer_logprob);
  const E* inference =
      stage<E>(args.inference_logprobs, absent, begin, count, staging.inference_logprob);
  const TokenInput advantages = wanted.negative ? args.advantages : TokenInput{};
  const E* advantage = stage<E>(advantages, absent, begin, count, staging.advantage);
  const uint8_t* active = stage_mask<E>(args.loss_mask, begin, count, staging.active);
  for (int64_t i = 0; i < count; i += kLanes<E>) {
    add_to_sequence<T>(sequence, load<T>(trainer + i) - load<T>(inference + i),
                       load<T>(advantage + i), load_mask<T>(active + i), wanted);
  }
}

// Adds the lanes of a vector of sums in order.
template <typename E>
inline __attribute__((always_inline)) SequenceSums<E> merge_lanes(
    const SequenceSums<Vector<E>>& vector) {
  double sums[estimator::kNumRows][kLanes<E>];
  memcpy(sums, vector.sums, sizeof(sums));
  SequenceSums<E> total = empty_sequence_sums<E>();
  for (int lane = 0; lane < kLanes<E>; ++lane) {
    SequenceSums<E> each = {};
    for (int k = 0; k < estimator::kNumRows; ++k) {
      each.sums[k] = sums[k][lane];
      each.smallest[k] = vector.smallest[k][lane];
      each.largest[k] = vector.largest[k][lane];
    }
    each.active = static_cast<uint32_t>(vector.active[lane]);
    each.negative = static_cast<uint32_t>(vector.negative[lane]);
    total = merge(total, each);
  }
  return total;
}

template <typename E>
inline __attribute__((always_inline)) SequenceSums<E> sequence_sums(const IpoLossArgs& args,
                                                                    int64_t begin, int64_t end) {
  SequenceStaging<E> staging;
  auto sequence = empty_sequence_sums<Vector<E>>();
  const WantedSums wanted = wanted_by(args.sequence_rules);
  for (int64_t first = begin; first < end;) {
    const int64_t count = chunk_tokens<E>(end - first);
    add_chunk<E>(args, first, count, wanted, staging, sequence);
    first += count;
  }
  return merge_lanes<E>(sequence);
}

}  // namespace

#define IPO_EXT_DEFINE_SEQUENCE_SUMS(name, E)                                 \
  SequenceSums<E> name(const IpoLossArgs& args, int64_t begin, int64_t end) { \
    return sequence_sums<E>(args, begin, end);                                \
  }
IPO_EXT_SEQUENCE_SUMS(IPO_EXT_DEFINE_SEQUENCE_SUMS)
#undef IPO_EXT_DEFINE_SEQUENCE_SUMS

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
