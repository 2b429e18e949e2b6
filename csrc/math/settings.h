// The settings of the loss, listed once. This struct, the operators' schemas and how their
// arguments are read (ops/arguments.h) are made from the list, so a new setting is one line here.
#pragma once

#include <limits>

#include "math/mask_rules.h"

namespace ipo_ext::math {

// A number that may be absent, also on a device, where there is no std::optional.
template <typename E>
struct OptionalNumber {
  bool has_value = false;
  E value = -std::numeric_limits<E>::infinity();  // where there is none, a bound below everything

  template <typename To>
  IPO_HOST_DEVICE explicit operator OptionalNumber<To>() const {
    return {has_value, static_cast<To>(value)};
  }
};

// X(type in a schema, type in the struct, name); E is the compute dtype's scalar. The order is that
// of the schemas. Bounds mean what the rule says; those of the ratio are logarithms, rounded and
// clamped by the caller so that no x between them is infinite or has an infinite exp (docs/math.md,
// "The band"). With kl_active every active token pays the KL, not kept ones alone. An active token
// whose log-ratio is below rollout_low drops its whole sequence.
#define IPO_EXT_LOSS_SETTINGS(X) \
  X("float", E, low)             \
  X("float", E, high)            \
  X("float", E, adv_tau)         \
  X("float", E, kl_tau)          \
  X("float", E, teacher_tau)     \
  X("int", MaskRule, mask_rule)  \
  X("bool", bool, kl_active)     \
  X("float?", OptionalNumber<E>, rollout_low)

template <typename E>
struct LossSettings {
#define IPO_EXT_MEMBER(schema, Type, name) Type name;
  IPO_EXT_LOSS_SETTINGS(IPO_EXT_MEMBER)
#undef IPO_EXT_MEMBER

  IPO_HOST_DEVICE bool has_rollout_rule() const { return rollout_low.has_value; }
};

// Returns the settings with numbers of another type.
template <typename E, typename From>
IPO_HOST_DEVICE LossSettings<E> settings_as(const LossSettings<From>& settings) {
#define IPO_EXT_CAST(schema, Type, name) static_cast<Type>(settings.name),
  return {IPO_EXT_LOSS_SETTINGS(IPO_EXT_CAST)};
#undef IPO_EXT_CAST
}

}  // namespace ipo_ext::math
