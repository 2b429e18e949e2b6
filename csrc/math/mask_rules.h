// Which tokens are kept: one function a rule. Each compares the two log-probabilities with bounds,
// and never keeps a token whose log-ratio or ratio is not finite.
#pragma once

#include "math/exponential.h"
#include "math/logarithm.h"

namespace ipo_ext::math {

// In the order of Python's config.MaskRule.
enum class MaskRule : int32_t { kRatio, kDppo, kProbDiff, kKpop, kCount };

// What a kernel is compiled for: the default settings alone, whose code knows no other rule, or
// every rule and scope, chosen at run time.
enum class Rules { kDefault, kAny };

template <typename T>
struct Candidate {
  T trainer_logprob;
  T inference_logprob;
  T log_ratio;
  T advantage;
  Mask<T> active;
  Mask<T> finite;  // neither the log-ratio nor the ratio overflows
};

template <typename T>
struct Verdict {
  Mask<T> kept;
  Mask<T> above;  // active and dropped on the high side
  Mask<T> below;  // active and dropped on the low side
};

// low <= log r <= high: the band on the ratio, decided in log space. Bounds that are finite and
// whose exp is finite keep no infinity.
template <typename T>
IPO_HOST_DEVICE Verdict<T> ratio_rule(const Candidate<T>& token, Element<T> low, Element<T> high) {
  const T x = token.log_ratio;
  const Mask<T> kept = token.active & (x >= low) & (x <= high);
  const Mask<T> above = token.active & (x > high);
  const Mask<T> below = token.active & (x < low);
  return {kept, above, below};
}

// Of the other rules: whatever is dropped on whichever side, only an active token counts, and only
// a finite one is kept.
template <typename T>
IPO_HOST_DEVICE Verdict<T> verdict(const Candidate<T>& token, Mask<T> dropped, Mask<T> above,
                                   Mask<T> below) {
  Verdict<T> verdict;
  verdict.kept = Lanes<T>::and_not(token.active & token.finite, dropped);
  verdict.above = token.active & above;
  verdict.below = token.active & below;
  return verdict;
}

// p - q, of log-probabilities that count as no more than the largest whose exp is finite.
template <typename T>
IPO_HOST_DEVICE T probability_difference(const Candidate<T>& token) {
  return exponential(token.trainer_logprob).exp - exponential(token.inference_logprob).exp;
}

// Drops where the probability has moved too far in the direction in which the advantage pushes.
template <typename T>
IPO_HOST_DEVICE Verdict<T> dppo_rule(const Candidate<T>& token, Element<T> low, Element<T> high) {
  using E = Element<T>;
  const T d = probability_difference(token);
  const Mask<T> above = (token.advantage > E(0)) & (d > high);
  const Mask<T> below = (token.advantage <= E(0)) & (d < -low);
  return verdict(token, above | below, above, below & (token.advantage < E(0)));
}

// -low <= p - q <= high.
template <typename T>
IPO_HOST_DEVICE Verdict<T> prob_diff_rule(const Candidate<T>& token, Element<T> low,
                                          Element<T> high) {
  const T d = probability_difference(token);
  const Mask<T> above = d > high;
  const Mask<T> below = d < -low;
  return verdict(token, above | below, above, below);
}

constexpr double kSmallestProbability = 1e-6;
constexpr double kLogSmallest = -13.815510557964274;    // of it
constexpr double kLogLargest = -1.0000005000003333e-6;  // of 1 minus it

template <typename T>
IPO_HOST_DEVICE T clamped(T value, double smallest, double largest) {
  using E = Element<T>;
  return smaller(larger(value, splat<T>(E(smallest))), splat<T>(E(largest)));
}

// The larger of KL(p || q) and KL(q || p) between two coins is at most high.
template <typename T>
IPO_HOST_DEVICE Verdict<T> kpop_rule(const Candidate<T>& token, Element<T>, Element<T> high) {
  using E = Element<T>;
  const T log_p = clamped(token.trainer_logprob, kLogSmallest, kLogLargest);
  const T log_q = clamped(token.inference_logprob, kLogSmallest, kLogLargest);
  const T p = clamped(exponential(log_p).exp, kSmallestProbability, 1 - kSmallestProbability);
  const T q = clamped(exponential(log_q).exp, kSmallestProbability, 1 - kSmallestProbability);
  const T heads = log_p - log_q;
  const T tails = logarithm(E(1) - p) - logarithm(E(1) - q);
  const T forward = p * heads + (E(1) - p) * tails;
  const T backward = -q * heads - (E(1) - q) * tails;
  const Mask<T> dropped = larger(forward, backward) > high;
  return verdict(token, dropped, dropped & (token.log_ratio > E(0)),
                 dropped & (token.log_ratio < E(0)));
}

// The rollout rule: a token that drops its whole sequence. A ratio of 0 is below any bound.
template <typename T>
IPO_HOST_DEVICE Mask<T> drops_rollout(Mask<T> active, T log_ratio, Element<T> low) {
  return active & (log_ratio < low);
}

template <Rules kRules, typename T>
IPO_HOST_DEVICE Verdict<T> verdict_of(const Candidate<T>& token, MaskRule rule, Element<T> low,
                                      Element<T> high) {
  if constexpr (kRules == Rules::kAny) {
    if (rule == MaskRule::kDppo) return dppo_rule(token, low, high);
    if (rule == MaskRule::kProbDiff) return prob_diff_rule(token, low, high);
    if (rule == MaskRule::kKpop) return kpop_rule(token, low, high);
  }
  return ratio_rule(token, low, high);
}

}  // namespace ipo_ext::math
