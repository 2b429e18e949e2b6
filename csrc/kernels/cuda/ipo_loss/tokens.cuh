// A vector of tokens, as a thread has them in registers: all their inputs, loaded side by side.
#pragma once

#include "kernels/cuda/common/vector.cuh"
#include "kernels/ipo_loss.h"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// The tokens that a thread loads and stores at once: 16 bytes in the compute dtype.
template <typename E>
constexpr int kTokensPerVector = 16 / sizeof(E);

#define IPO_EXT_MEMBER(member, ...) E member[kCount];
#define IPO_EXT_VISIT_REQUIRED(member, tensor) visit(args.tensor, member);
#define IPO_EXT_VISIT_OPTIONAL(member, tensor, absent) \
  if (args.tensor.data != nullptr) visit(args.tensor, member);
#define IPO_EXT_REQUIRED(member, tensor) member[i],
#define IPO_EXT_OPTIONAL(member, tensor, absent) \
  args.tensor.data != nullptr ? member[i] : E(absent),

// All inputs of kCount neighbouring tokens.
template <typename E, int kCount>
struct TokenVector {
  E trainer_logprob[kCount];
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_MEMBER, IPO_EXT_MEMBER)
  E entropy[kCount];
  uint32_t mask;  // a byte for each token

  // Loads tokens [index, index + kCount), all of which exist. No load waits for another, so half
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

  // Calls visit(input, values) for the inputs that there are.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const IpoLossArgs& args, const Visit& visit) {
    visit(args.trainer_logprobs, trainer_logprob);
    IPO_EXT_TOKEN_INPUTS(IPO_EXT_VISIT_REQUIRED, IPO_EXT_VISIT_OPTIONAL)
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
    return {trainer_logprob[i], IPO_EXT_TOKEN_INPUTS(IPO_EXT_REQUIRED, IPO_EXT_OPTIONAL) active(i),
            args.entropy.data != nullptr ? entropy[i] : E(0)};
  }
};

#undef IPO_EXT_OPTIONAL
#undef IPO_EXT_REQUIRED
#undef IPO_EXT_VISIT_OPTIONAL
#undef IPO_EXT_VISIT_REQUIRED
#undef IPO_EXT_MEMBER

}  // namespace ipo_ext::cuda
