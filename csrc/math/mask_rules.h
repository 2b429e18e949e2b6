// Decides which tokens are kept: one function for each rule. Each compares the two
// log-probabilities with bounds, `none` with nothing, and none keeps a token whose log-ratio is not
// finite, or a ratio that the policy form does not bound.
#pragma once

#include "math/exponential.h"
#include "math/logarithm.h"

namespace ipo_ext::math {

// Every rule but the default's, the band on the ratio: X(name, function), in the order of Python's
// config.MaskRule, which begins with "ratio".
#define IPO_EXT_OTHER_MASK_RULES(X) \
  X(kDppo, dppo_rule)               \
  X(kProbDiff, prob_diff_rule)      \
  X(kKpop, kpop_rule)               \
  X(kNone, keep_all)

#define IPO_EXT_ENUMERATOR(name, function) name,
enum class MaskRule : int32_t { kRatio, IPO_EXT_OTHER_MASK_RULES(IPO_EXT_ENUMERATOR) kCount };
#undef IPO_EXT_ENUMERATOR

// What a kernel is compiled for: the default settings alone, whose code knows no other rule, or
// every rule and scope, chosen at run time.
enum class Rules { kDefault, kAny };

// What a rule may look at.
template <typename T>
struct MaskInput {
  T trainer_logprob;
  T inference_logprob;
  T log_ratio;
  T advantage;
  Mask<T> active;
  Mask<T> finite;  // neither the log-ratio nor a ratio that is not bounded overflows
};

// What a rule says of a token.
template <typename T>
struct MaskDecision {
  Mask<T> kept;
  Mask<T> masked_high;  // active and dropped on the high side
  Mask<T> masked_low;   // active and dropped on the low side
};

// Keeps low <= log r <= high: the band on the ratio, decided in log space. Bounds that are finite
// and whose exp is finite keep no infinity.
template <typename T>
IPO_HOST_DEVICE MaskDecision<T> ratio_rule(const MaskInput<T>& token, Element<T> low,
                                           Element<T> high) {
  const T x = token.log_ratio;
  const Mask<T> kept = token.active & (x >= low) & (x <= high);
  const Mask<T> masked_high = token.active & (x > high);
  const Mask<T> masked_low = token.active & (x < low);
  return {kept, masked_high, masked_low};
}

// Completes the decision of the other rules: whatever they drop on whichever side, only an active
// token counts, and only a finite one is kept.
template <typename T>
IPO_HOST_DEVICE MaskDecision<T> decide(const MaskInput<T>& token, Mask<T> dropped,
                                       Mask<T> dropped_high, Mask<T> dropped_low) {
  MaskDecision<T> decision;
  decision.kept = Lanes<T>::and_not(token.active & token.finite, dropped);
  decision.masked_high = token.active & dropped_high;
  decision.masked_low = token.active & dropped_low;
  return decision;
}

// Returns p - q as the larger probability times 1 - exp(-|x|), which cancels nothing near a bound.
// Log-probabilities count as no more than the largest whose exp is finite; NaN for NaN.
template <typename T>
IPO_HOST_DEVICE T probability_difference(const MaskInput<T>& token) {
  using E = Element<T>;
  constexpr E kFar = 80;  // exp(-80) vanishes beside 1
  const T x = token.log_ratio;
  const T distance = smaller(larger(x, -x), splat<T>(kFar));
  const T one_minus_exp = distance - exponential(-distance).exp_minus_1_minus_x;
  const T larger_one = exponential(larger(token.trainer_logprob, token.inference_logprob)).exp;
  const T difference = larger_one * one_minus_exp;
  return select<T>(x > E(0), difference, select<T>(x <= E(0), -difference, x));
}

// Drops where the probability has moved too far in the direction in which the advantage pushes.
template <typename T>
IPO_HOST_DEVICE MaskDecision<T> dppo_rule(const MaskInput<T>& token, Element<T> low,
                                          Element<T> high) {
  using E = Element<T>;
  const T d = probability_difference(token);
  const Mask<T> too_high = (token.advantage > E(0)) & (d > high);
  const Mask<T> too_low = (token.advantage <= E(0)) & (d < -low);
  return decide(token, too_high | too_low, too_high, too_low & (token.advantage < E(0)));
}

// Keeps -low <= p - q <= high.
template <typename T>
IPO_HOST_DEVICE MaskDecision<T> prob_diff_rule(const MaskInput<T>& token, Element<T> low,
                                               Element<T> high) {
  const T d = probability_difference(token);
  const Mask<T> too_high = d > high;
  const Mask<T> too_low = d < -low;
  return decide(token, too_high | too_low, too_high, too_low);
}

constexpr double kSmallestProbability = 1e-6;
constexpr double kLogSmallest = -13.815510557964274;    // log(kSmallestProbability)
constexpr double kLogLargest = -1.0000005000003333e-6;  // log(1 - kSmallestProbability)

template <typename T>
IPO_HOST_DEVICE T clamped(T value, double smallest, double largest) {
  using E = Element<T>;
  return smaller(larger(value, splat<T>(E(smallest))), splat<T>(E(largest)));
}

// Keeps where the larger of the Bernoulli KLs, KL(p || q) and KL(q || p), is at most high.
template <typename T>
IPO_HOST_DEVICE MaskDecision<T> kpop_rule(const MaskInput<T>& token, Element<T>, Element<T> high) {
  using E = Element<T>;
  const T log_p = clamped(token.trainer_logprob, kLogSmallest, kLogLargest);
  const T log_q = clamped(token.inference_logprob, kLogSmallest, kLogLargest);
  const T p = clamped(exponential(log_p).exp, kSmallestProbability, 1 - kSmallestProbability);
  const T q = clamped(exponential(log_q).exp, kSmallestProbability, 1 - kSmallestProbability);
  const T log_ratio_of_p = log_p - log_q;
  const T log_ratio_of_rest = logarithm(E(1) - p) - logarithm(E(1) - q);
  const T forward = p * log_ratio_of_p + (E(1) - p) * log_ratio_of_rest;
  const T backward = -q * log_ratio_of_p - (E(1) - q) * log_ratio_of_rest;
  const Mask<T> dropped = larger(forward, backward) > high;
  return decide(token, dropped, dropped & (token.log_ratio > E(0)),
                dropped & (token.log_ratio < E(0)));
}

// Keeps every active token whose log-ratio and ratio are finite.
template <typename T>
IPO_HOST_DEVICE MaskDecision<T> keep_all(const MaskInput<T>& token, Element<T>, Element<T>) {
  return decide(token, Mask<T>{}, Mask<T>{}, Mask<T>{});
}

template <Rules kRules, typename T>
IPO_HOST_DEVICE MaskDecision<T> mask_decision(const MaskInput<T>& token, MaskRule rule,
                                              Element<T> low, Element<T> high) {
  if constexpr (kRules == Rules::kAny) {
#define IPO_EXT_DECIDE(name, function) \
  if (rule == MaskRule::name) return function(token, low, high);
    IPO_EXT_OTHER_MASK_RULES(IPO_EXT_DECIDE)
#undef IPO_EXT_DECIDE
  }
  return ratio_rule(token, low, high);
}

}  // namespace ipo_ext::math
