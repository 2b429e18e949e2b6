// The settings of the loss, listed once. The struct below, the operators' schemas and how their
// arguments are read (ops/) are made from these lists, so a new setting is one line here.
#pragma once

#include "math/mask_rules.h"

namespace ipo_ext::math {

// X(type in a schema, type in the struct, name); E is the compute dtype's scalar.

// Bounds mean what the mask rule says; those of the ratio are logarithms, rounded and clamped by
// the caller so that no x between them is infinite or has an infinite exp (docs/math.md, "The
// band").
#define IPO_EXT_LOSS_NUMBERS(X) \
  X("float", E, low)            \
  X("float", E, high)           \
  X("float", E, adv_tau)        \
  X("float", E, kl_tau)         \
  X("float", E, teacher_tau)

// With kl_active every active token pays the KL, not kept ones alone. Under a rollout rule an
// active token whose log-ratio is below rollout_low drops its whole sequence.
#define IPO_EXT_LOSS_RULES(X)       \
  X("int", MaskRule, mask_rule)     \
  X("bool", bool, kl_active)        \
  X("bool", bool, has_rollout_rule) \
  X("float", E, rollout_low)

// All of them, in the order of the schemas.
#define IPO_EXT_LOSS_SETTINGS(X) IPO_EXT_LOSS_NUMBERS(X) IPO_EXT_LOSS_RULES(X)

#define IPO_EXT_MEMBER(schema, Type, name) Type name;

// The settings, and what the kernels add to them.
template <typename E>
struct LossParams {
  IPO_EXT_LOSS_NUMBERS(IPO_EXT_MEMBER)
  E inv_normalizer;  // see inverse_normalizer
  IPO_EXT_LOSS_RULES(IPO_EXT_MEMBER)
  bool rollout_dropped;  // whether the rollout rule has dropped the tokens at hand

  IPO_HOST_DEVICE Rules rules() const {
    return mask_rule == MaskRule::kRatio && !kl_active && !has_rollout_rule ? Rules::kDefault
                                                                            : Rules::kAny;
  }
};

#undef IPO_EXT_MEMBER

}  // namespace ipo_ext::math
