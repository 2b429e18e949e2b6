// A vector of tokens, as a thread has them in registers: all their inputs, loaded side by side.
#pragma once

#include "kernels/cuda/common/vector.cuh"
#include "kernels/ipo_loss.h"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// The inputs that a kernel is compiled for: the required ones alone, all in fp32, or any of any
// dtype.
enum class Inputs { kPlain, kAny };

// The tokens that a thread loads and stores at once: 16 bytes in the compute dtype.
template <typename E>
constexpr int kTokensPerVector = 16 / sizeof(E);

#define IPO_EXT_MEMBER(member, ...) E member[kCount];
#define IPO_EXT_MOVE(member, tensor, ...) args.tensor = from_token<kInputs>(args.tensor, begin);
#define IPO_EXT_VISIT_REQUIRED(member, tensor) visit(args.tensor, member);
#define IPO_EXT_IS_ALIGNED(member, tensor) aligned &= is_aligned(args.tensor.data);
#define IPO_EXT_IS_ALIGNED_TOO(member, tensor, absent) \
  if (kInputs == Inputs::kAny) IPO_EXT_IS_ALIGNED(member, tensor)
#define IPO_EXT_VISIT_OPTIONAL(member, tensor, absent) \
  visit_optional(args.tensor, member, E(absent), visit);
#define IPO_EXT_ELEMENT(member, ...) member[i],

// All inputs of kCount neighbouring tokens.
template <typename E, int kCount, Inputs kInputs = Inputs::kAny>
struct TokenVector {
  E trainer_logprob[kCount];
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_MEMBER, IPO_EXT_MEMBER)
  E entropy[kCount];
  uint32_t mask;  // a byte for each token

  // Loads tokens [index, index + kCount), all of which exist. No load waits for another, so half
  // precision is widened later, by widen().
  __device__ __forceinline__ void load(const IpoLossArgs& args, int64_t index) {
    for_each(args, [=](const TokenInput& input, E(&values)[kCount]) {
      if constexpr (kInputs == Inputs::kPlain) {
        load_aligned(input.data, index, values);
      } else {
        load_tokens_as_stored(input, index, values);
      }
    });
    load_mask(args.loss_mask, index);
  }
  __device__ __forceinline__ void widen(const IpoLossArgs& args) {
    for_each(args, [](const TokenInput& input, E(&values)[kCount]) {
      if constexpr (kInputs == Inputs::kAny) widen_tokens(input.dtype, values);
    });
  }

  // Calls visit(input, values) for the inputs that there are, and sets the others to what stands
  // for them.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const IpoLossArgs& args, const Visit& visit) {
    visit(args.trainer_logprobs, trainer_logprob);
    IPO_EXT_TOKEN_INPUTS(IPO_EXT_VISIT_REQUIRED, IPO_EXT_VISIT_OPTIONAL)
    visit_optional(args.entropy, entropy, E(0), visit);
  }
  template <typename Visit>
  __device__ __forceinline__ void visit_optional(const TokenInput& input, E (&values)[kCount],
                                                 E absent, const Visit& visit) {
    if (kInputs == Inputs::kAny && input.data != nullptr) {
      visit(input, values);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = absent;
    }
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

  __device__ __forceinline__ Token<E> token(int i) const {
    return {trainer_logprob[i], IPO_EXT_TOKEN_INPUTS(IPO_EXT_ELEMENT, IPO_EXT_ELEMENT) active(i),
            entropy[i]};
  }
};

template <Inputs kInputs>
__device__ __forceinline__ TokenInput from_token(TokenInput input, int64_t begin) {
  const int bytes = kInputs == Inputs::kPlain ? sizeof(float) : bytes_of(input.dtype);
  if (input.data != nullptr) input.data = static_cast<const char*>(input.data) + begin * bytes;
  return input;
}

// Returns the arguments of the tokens from `begin` on alone, so that 32 bits are enough for the
// index of a token in a tile.
template <Inputs kInputs>
__device__ __forceinline__ IpoLossArgs args_from(IpoLossArgs args, int64_t begin) {
  IPO_EXT_MOVE(trainer_logprob, trainer_logprobs)
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_MOVE, IPO_EXT_MOVE)
  IPO_EXT_MOVE(entropy, entropy)
  args.loss_mask += begin;
  if (args.gradient != nullptr) args.gradient = static_cast<float*>(args.gradient) + begin;
  return args;
}

template <Inputs kInputs>
__device__ __forceinline__ TokenExtras extras_of(const IpoLossArgs& args) {
  return kInputs == Inputs::kAny ? ipo_ext::extras_of(args) : TokenExtras{};
}

// Returns whether neighbouring tokens can be loaded and stored as vectors.
template <Inputs kInputs = Inputs::kAny>
IPO_HOST_DEVICE bool vectorizable(const IpoLossArgs& args) {
  bool aligned = is_aligned(args.trainer_logprobs.data) & is_aligned(args.loss_mask) &
                 is_aligned(args.gradient);
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_IS_ALIGNED, IPO_EXT_IS_ALIGNED_TOO)
  if (kInputs == Inputs::kAny) aligned &= is_aligned(args.entropy.data);
  return aligned;
}

#undef IPO_EXT_ELEMENT
#undef IPO_EXT_VISIT_OPTIONAL
#undef IPO_EXT_MOVE
#undef IPO_EXT_IS_ALIGNED_TOO
#undef IPO_EXT_IS_ALIGNED
#undef IPO_EXT_VISIT_REQUIRED
#undef IPO_EXT_MEMBER

}  // namespace ipo_ext::cuda
