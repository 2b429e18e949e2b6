// The arguments that several operators share, as structs. Each group is listed once: the struct,
// its part of a schema (ops/schemas.h) and how it is read (ops/box.h) are made from the list, so a
// new argument is one line here; a setting is one in math/settings.h.
#pragma once

#include "math/components.h"
#include "math/settings.h"
#include "ops/tensors.h"

namespace ipo_ext {

// X(type in a schema, type in the struct, name), as in math/settings.h.

// What becomes of logits before the softmax, and what of it is wanted.
#define IPO_EXT_LOGIT_SCALING(X)                     \
  X("Tensor?", std::optional<Tensor>, temperature)   \
  X("float", double, softcap)                        \
  X("Tensor?", std::optional<Tensor>, sampling_mask) \
  X("bool", bool, with_entropy)

// What the loss takes besides the policy; no gradient flows to it.
#define IPO_EXT_LOSS_INPUTS(X)                          \
  X("Tensor", Tensor, inference_logprobs)               \
  X("Tensor", Tensor, advantages)                       \
  X("Tensor", Tensor, loss_mask)                        \
  X("Tensor?", std::optional<Tensor>, teacher_logprobs) \
  X("Tensor?", std::optional<Tensor>, loss_weights)     \
  X("Tensor?", std::optional<Tensor>, cu_seqlens)       \
  X("Tensor?", std::optional<Tensor>, normalizer)       \
  X("Tensor?", std::optional<Tensor>, sequence_totals)

// What stands beside the loss (math/components.h), whose settings follow; no gradient flows to it.
#define IPO_EXT_COMPONENT_INPUTS(X)                   \
  X("Tensor?", std::optional<Tensor>, ce_weights)     \
  X("Tensor?", std::optional<Tensor>, ref_kl_weights) \
  X("Tensor?", std::optional<Tensor>, ref_logprobs)   \
  X("Tensor?", std::optional<Tensor>, ce_scale)       \
  X("Tensor?", std::optional<Tensor>, ref_kl_scale)

#define IPO_EXT_MEMBER(schema, Type, name) Type name;

struct __attribute__((visibility("hidden"))) LogitScaling {
  IPO_EXT_LOGIT_SCALING(IPO_EXT_MEMBER)
};

struct __attribute__((visibility("hidden"))) LossInputs {
  IPO_EXT_LOSS_INPUTS(IPO_EXT_MEMBER)
};

struct __attribute__((visibility("hidden"))) Components {
  IPO_EXT_COMPONENT_INPUTS(IPO_EXT_MEMBER)
  math::ComponentParams<double> params;
};

#undef IPO_EXT_MEMBER

// For an operator that writes over `written`.
inline LogitScaling apart_from(const Tensor& written, const LogitScaling& scaling) {
  return {apart_from(written, scaling.temperature), scaling.softcap,
          apart_from(written, scaling.sampling_mask), scaling.with_entropy};
}

#define IPO_EXT_APART(schema, Type, name) apart_from(written, inputs.name),

inline LossInputs apart_from(const Tensor& written, const LossInputs& inputs) {
  return {IPO_EXT_LOSS_INPUTS(IPO_EXT_APART)};
}

#undef IPO_EXT_APART

// As the operators are given them; the kernels add the rest.
struct __attribute__((visibility("hidden"))) LossSettings {
  math::LossParams<double> params;
  math::SequenceRules sequence_rules;
};

}  // namespace ipo_ext
