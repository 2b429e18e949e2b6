// The settings of the loss, listed once. The struct below, the operators' schemas and how their
// arguments are read (ops/) are made from these lists, so a new setting is one line here.
#pragma once

#include "math/mask_rules.h"
#include "math/policy_terms.h"
#include "math/sequence_rules.h"

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

// With kl_active every active token pays the KL, not kept ones alone. With judges_sequences whole
// sequences are dropped or weighed: by an active token whose log-ratio is below rollout_low, and by
// what is listed next. A log-ratio above largest_log_ratio is not finite: its ratio overflows, and
// the policy form does not bound it.
#define IPO_EXT_LOSS_RULES(X)       \
  X("int", MaskRule, mask_rule)     \
  X("bool", bool, kl_active)        \
  X("bool", bool, judges_sequences) \
  X("float", E, rollout_low)        \
  X("int", PolicyForm, pg_form)     \
  X("float", E, ratio_cap)          \
  X("float", E, clip_low)           \
  X("float", E, clip_high)          \
  X("float", E, log_ratio_cap)      \
  X("float", E, log_clip_low)       \
  X("float", E, log_clip_high)      \
  X("float", E, largest_log_ratio)

// What becomes the SequenceRules: of each rule statistic, low and high, one after the other, and
// the other members. None, not an empty list, where there are no rules: AOTInductor (torch 2.13)
// hands on no empty list.
#define IPO_EXT_SEQUENCE_SETTINGS(X)                                \
  X("float[]?", std::optional<std::vector<double>>, sequence_rules) \
  X("bool", bool, only_negative)                                    \
  X("int", SequenceWeight, sequence_weight)                         \
  X("float", double, sequence_weight_cap)

// All of them, in the order of the schemas.
#define IPO_EXT_LOSS_SETTINGS(X) \
  IPO_EXT_LOSS_NUMBERS(X) IPO_EXT_LOSS_RULES(X) IPO_EXT_SEQUENCE_SETTINGS(X)

#define IPO_EXT_MEMBER(schema, Type, name) Type name;

// The settings, and what the kernels add to them.
template <typename E>
struct LossParams {
  IPO_EXT_LOSS_NUMBERS(IPO_EXT_MEMBER)
  E inv_normalizer;  // see inverse_normalizer
  IPO_EXT_LOSS_RULES(IPO_EXT_MEMBER)
  SequenceVerdict sequence;  // on that of the tokens at hand

  IPO_HOST_DEVICE Rules rules() const {
    const bool is_default = mask_rule == MaskRule::kRatio && pg_form == PolicyForm::kRatio &&
                            !kl_active && !judges_sequences;
    return is_default ? Rules::kDefault : Rules::kAny;
  }
  IPO_HOST_DEVICE PolicyBounds<E> policy_bounds() const {
    return {ratio_cap, clip_low, clip_high, log_ratio_cap, log_clip_low, log_clip_high};
  }
};

#undef IPO_EXT_MEMBER

}  // namespace ipo_ext::math
