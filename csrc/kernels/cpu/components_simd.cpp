// The components beside the loss on the CPU, of one span of tokens: a SIMD loop over their math,
// which adds to the gradients that the loss has written. Compiled once for each instruction set
// (IPO_EXT_CPU_ARCH names it), chosen at run time in ipo_loss.cpp.
#include "kernels/cpu/ipo_loss_simd.h"
#include "kernels/cpu/token_chunks.h"

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

using namespace ipo_ext::math;

#define IPO_EXT_STAGED(member, ...) alignas(64) E member[kChunk];
#define IPO_EXT_STAGE(member, tensor) \
  const E* member = stage<E>(args.components.tensor, absent, begin, count, staging.member);
#define IPO_EXT_LOAD(member, ...) load<T>(member + i),

template <typename E>
struct ComponentStaging {
  alignas(64) E trainer_logprob[kChunk];
  alignas(64) E inference_logprob[kChunk];
  IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_STAGED)
  alignas(64) E gradient[kChunk];
};

template <typename E>
inline __attribute__((always_inline)) void add_chunk(const IpoLossArgs& args, int64_t begin,
                                                     int64_t count,
                                                     const ComponentParams<E>& shared_params,
                                                     ComponentStaging<E>& staging,
                                                     ComponentSums<Vector<E>>& total) {
  using T = Vector<E>;
  const ComponentParams<E> params = shared_params;  // a copy, which no store can change
  const Constant<E>& absent = kConstant<E, 0>;
  const E* trainer_logprob =
      stage<E>(args.trainer_logprobs, absent, begin, count, staging.trainer_logprob);
  const E* inference_logprob =
      stage<E>(args.inference_logprobs, absent, begin, count, staging.inference_logprob);
  IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_STAGE)
  E* const stored = static_cast<E*>(args.gradient) + begin;
  const bool has_gradient = args.gradient != nullptr;
  const bool is_staged = !has_gradient || is_ragged<E>(count);
  if (is_staged && has_gradient) memcpy(staging.gradient, stored, count * sizeof(E));
  E* const gradient = is_staged ? staging.gradient : stored;
  for (int64_t i = 0; i < count; i += kLanes<E>) {
    const ComponentToken<T> token = {IPO_EXT_LOAD(trainer_logprob) IPO_EXT_LOAD(inference_logprob)
                                         IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_LOAD)};
    store(gradient + i, load<T>(gradient + i) + add_components<T>(total, token, params));
  }
  if (is_staged && has_gradient) memcpy(stored, staging.gradient, count * sizeof(E));
}

#undef IPO_EXT_LOAD
#undef IPO_EXT_STAGE
#undef IPO_EXT_STAGED

// Adds the lanes of a vector of sums in order.
template <typename E>
inline __attribute__((always_inline)) ComponentTotals
merge_lanes(const ComponentSums<Vector<E>>& vector) {
  double sums[component_sum::kNumRows][kLanes<E>];
  memcpy(sums, vector.sums, sizeof(sums));
  ComponentTotals total = {};
  for (int lane = 0; lane < kLanes<E>; ++lane) {
    for (int row = 0; row < component_sum::kNumRows; ++row) total.sums[row] += sums[row][lane];
    for (int row = 0; row < component_count::kNumRows; ++row)
      total.counts[row] += static_cast<uint32_t>(vector.counts[row][lane]);
  }
  return total;
}

template <typename E>
inline __attribute__((always_inline)) ComponentTotals add_components_of(const IpoLossArgs& args,
                                                                        int64_t begin,
                                                                        int64_t end) {
  ComponentStaging<E> staging = {};
  ComponentSums<Vector<E>> total = {};
  const auto params = component_params_for<E>(args.components);
  for (int64_t first = begin; first < end;) {
    const int64_t count = chunk_tokens<E>(end - first);
    add_chunk<E>(args, first, count, params, staging, total);
    first += count;
  }
  return merge_lanes<E>(total);
}

}  // namespace

#define IPO_EXT_DEFINE_ADD_COMPONENTS(name, E)                                \
  ComponentTotals name(const IpoLossArgs& args, int64_t begin, int64_t end) { \
    return add_components_of<E>(args, begin, end);                            \
  }
IPO_EXT_ADD_COMPONENTS(IPO_EXT_DEFINE_ADD_COMPONENTS)
#undef IPO_EXT_DEFINE_ADD_COMPONENTS

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
