// Computes what a kept token pays for its policy: one function for each form of the term. A form
// gives value and derivative, because most hold a factor constant.
#pragma once

#include "math/exponential.h"
#include "math/lanes.h"

namespace ipo_ext::math {

// Every form but the default's, -A r: X(name, function), in the order of Python's
// config.PolicyForm, which begins with "ratio".
#define IPO_EXT_OTHER_POLICY_FORMS(X) \
  X(kCapped, capped_term)             \
  X(kPpoClip, ppo_clip_term)          \
  X(kCispo, cispo_term)               \
  X(kReinforce, reinforce_term)

#define IPO_EXT_ENUMERATOR(name, function) name,
enum class PolicyForm : int32_t { kRatio, IPO_EXT_OTHER_POLICY_FORMS(IPO_EXT_ENUMERATOR) kCount };
#undef IPO_EXT_ENUMERATOR

// What a form may look at.
template <typename T>
struct PolicyInput {
  T trainer_logprob;
  T log_ratio;
  T ratio;      // the largest finite number where it overflows
  T advantage;  // A', 0 for a token of weight 0
  T push;       // A' of any token, whose sign says where the policy is pushed
};

// The bounds of the ratio, each as wide as numbers go where a form has none.
template <typename E>
struct PolicyBounds {
  E ratio_cap;
  E clip_low;
  E clip_high;
  E log_ratio_cap;
  E log_clip_low;
  E log_clip_high;
};

template <typename T>
struct PolicyTerm {
  T loss;
  T derivative;  // d loss / d trainer_logprob
  T ratio;       // what the importance ratio counts as
  Mask<T> clipped = {};
  Mask<T> capped = {};
};

template <typename T>
IPO_HOST_DEVICE PolicyTerm<T> ratio_term(const PolicyInput<T>& token) {
  const T loss = rounded_product(-token.advantage, token.ratio);
  return {loss, loss, token.ratio};
}

// The cap limits the ratio's size and stops no gradient.
template <typename T>
IPO_HOST_DEVICE PolicyTerm<T> capped_term(const PolicyInput<T>& token,
                                          const PolicyBounds<Element<T>>& bounds) {
  const T ratio = smaller(token.ratio, splat<T>(bounds.ratio_cap));
  const T loss = rounded_product(-token.advantage, ratio);
  return {loss, loss, ratio, Mask<T>{}, token.log_ratio > bounds.log_ratio_cap};
}

// PPO's -min(A r, A clip(r)): constant where the ratio has moved beyond a bound in the direction in
// which the advantage pushes. Decided in log space, as the masks are.
template <typename T>
IPO_HOST_DEVICE PolicyTerm<T> ppo_clip_term(const PolicyInput<T>& token,
                                            const PolicyBounds<Element<T>>& bounds) {
  using E = Element<T>;
  const Mask<T> too_high = (token.push > E(0)) & (token.log_ratio > bounds.log_clip_high);
  const Mask<T> too_low = (token.push < E(0)) & (token.log_ratio < bounds.log_clip_low);
  const PolicyTerm<T> inside = capped_term(token, bounds);
  const T constant = select<T>(too_high, splat<T>(bounds.clip_high), splat<T>(bounds.clip_low));
  const Mask<T> clipped = too_high | too_low;
  return {select<T>(clipped, -token.advantage * constant, inside.loss),
          select<T>(clipped, T{}, inside.derivative), inside.ratio, clipped, inside.capped};
}

// CISPO: the clipped ratio is a constant weight of the log-probability.
template <typename T>
IPO_HOST_DEVICE PolicyTerm<T> cispo_term(const PolicyInput<T>& token,
                                         const PolicyBounds<Element<T>>& bounds) {
  const T least = splat<T>(bounds.clip_low);
  const T ratio = smaller(larger(token.ratio, least), splat<T>(bounds.clip_high));
  const T derivative = rounded_product(-token.advantage, ratio);
  const Mask<T> clipped =
      (token.log_ratio > bounds.log_clip_high) | (token.log_ratio < bounds.log_clip_low);
  return {derivative * token.trainer_logprob, derivative, ratio, clipped};
}

// REINFORCE: no ratio at all; what it counts as is for the metrics alone.
template <typename T>
IPO_HOST_DEVICE PolicyTerm<T> reinforce_term(const PolicyInput<T>& token,
                                             const PolicyBounds<Element<T>>&) {
  const T ratio = smaller(token.ratio, splat<T>(Element<T>(kExpAtMeasureClamp)));
  return {-token.advantage * token.trainer_logprob, -token.advantage, ratio};
}

template <typename T>
IPO_HOST_DEVICE PolicyTerm<T> policy_term(const PolicyInput<T>& token, PolicyForm form,
                                          const PolicyBounds<Element<T>>& bounds) {
#define IPO_EXT_TERM(name, function) \
  if (form == PolicyForm::name) return function(token, bounds);
  IPO_EXT_OTHER_POLICY_FORMS(IPO_EXT_TERM)
#undef IPO_EXT_TERM
  return ratio_term(token);
}

}  // namespace ipo_ext::math
