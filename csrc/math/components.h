// Computes what a token pays for the two objectives that may stand beside the loss, each on weights
// and with a normalizer of its own: cross-entropy, and distillation from a reference. Both are the
// loss with other settings (docs/math.md, "Components").
#pragma once

#include <limits>

#include "math/metrics.h"
#include "math/token_loss.h"

namespace ipo_ext::math {

// What a token has for the components besides its log-probabilities: X(member, tensor). A weight of
// 0 says that it takes no part.
#define IPO_EXT_COMPONENT_TOKEN_INPUTS(X) \
  X(ce_weight, ce_weights)                \
  X(ref_kl_weight, ref_kl_weights)        \
  X(ref_logprob, ref_logprobs)

#define IPO_EXT_MEMBER(member, ...) T member;

template <typename T>
struct ComponentToken {
  T trainer_logprob;
  T inference_logprob;
  IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_MEMBER)
};

#undef IPO_EXT_MEMBER

// The settings of the distillation, X(type in a schema, type in the struct, name), as in
// settings.h. Without a cap the ratio may be as large as numbers go.
#define IPO_EXT_COMPONENT_SETTINGS(X) \
  X("float", E, ref_kl_cap)           \
  X("float", E, ref_kl_tau)

#define IPO_EXT_MEMBER(schema, Type, name) Type name;

template <typename E>
struct ComponentParams {
  IPO_EXT_COMPONENT_SETTINGS(IPO_EXT_MEMBER)
  E ce_inv_normalizer;  // see inverse_normalizer
  E ref_kl_inv_normalizer;
};

#undef IPO_EXT_MEMBER

// What is added up over all tokens of a batch.
#define IPO_EXT_COMPONENT_COUNTS(X) \
  X(ce_tokens)                      \
  X(ce_kept)                        \
  X(ref_kl_tokens)                  \
  X(ref_kl_finite)                  \
  X(ref_kl_kept)

#define IPO_EXT_COMPONENT_SUMS(X) \
  X(ce_loss)                      \
  X(nll)                          \
  X(ref_kl_loss)                  \
  X(ref_kl)                       \
  X(ref_kl_mismatch_kl_kept)      \
  X(ref_kl_mismatch_kl_masked)

// What users read: X(name, numerator, denominator), of the names above.
#define IPO_EXT_COMPONENT_MEANS(X)                                                       \
  X(nll, nll, ce_kept)                                                                   \
  X(ce_nonfinite, (ce_tokens - ce_kept), ce_tokens)                                      \
  X(ref_kl, ref_kl, ref_kl_finite)                                                       \
  X(ref_kl_nonfinite, (ref_kl_tokens - ref_kl_finite), ref_kl_tokens)                    \
  X(ref_kl_is_masked, (ref_kl_tokens - ref_kl_kept), ref_kl_tokens)                      \
  X(ref_kl_masked_mismatch_kl, ref_kl_mismatch_kl_masked, (ref_kl_tokens - ref_kl_kept)) \
  X(ref_kl_unmasked_mismatch_kl, ref_kl_mismatch_kl_kept, ref_kl_kept)

#define IPO_EXT_ENUMERATOR(name, ...) name,
namespace component_count {
enum Row : int { IPO_EXT_COMPONENT_COUNTS(IPO_EXT_ENUMERATOR) kNumRows };
}
namespace component_sum {
enum Row : int { IPO_EXT_COMPONENT_SUMS(IPO_EXT_ENUMERATOR) kNumRows };
}
namespace component_mean {
enum Row : int { IPO_EXT_COMPONENT_MEANS(IPO_EXT_ENUMERATOR) kNumRows };
}
#undef IPO_EXT_ENUMERATOR

template <typename T>
struct ComponentSums {
  Wide<T> sums[component_sum::kNumRows];
  typename Lanes<T>::Count counts[component_count::kNumRows];
};

// -w logprob: REINFORCE of an advantage of 1. A setting that neither component names is 0 for it.
template <typename T>
IPO_HOST_DEVICE TokenLoss<T> cross_entropy(const ComponentToken<T>& token,
                                           const ComponentParams<Element<T>>& settings) {
  using E = Element<T>;
  LossParams<E> params = {};
  params.adv_tau = 1;
  params.inv_normalizer = settings.ce_inv_normalizer;
  params.mask_rule = MaskRule::kNone;
  params.pg_form = PolicyForm::kReinforce;
  params.largest_log_ratio = kMaxLog<E>;
  Token<T> of_itself = blank_token<T>();
  of_itself.trainer_logprob = of_itself.inference_logprob = token.trainer_logprob;
  of_itself.advantage = splat<T>(E(1));
  of_itself.weight = token.ce_weight;
  of_itself.active = token.ce_weight != E(0);
  return token_loss<Rules::kAny, T>(of_itself, {splat<T>(E(1)), T{}}, params);
}

// -w (ref - trainer) min(r, cap), ref - trainer a constant, dropped where p - q < -0.2; with a
// ref_kl_tau every token pays w tau x^2 too.
template <typename T>
IPO_HOST_DEVICE TokenLoss<T> distillation(const ComponentToken<T>& token,
                                          const ComponentParams<Element<T>>& settings) {
  using E = Element<T>;
  const bool has_cap = settings.ref_kl_cap <= std::numeric_limits<E>::max();
  LossParams<E> params = {};
  params.low = E(0.2);
  params.high = std::numeric_limits<E>::infinity();
  params.kl_tau = settings.ref_kl_tau;
  params.teacher_tau = 1;
  params.inv_normalizer = settings.ref_kl_inv_normalizer;
  params.mask_rule = MaskRule::kProbDiff;
  params.kl_active = true;
  params.pg_form = PolicyForm::kCapped;
  params.ratio_cap = settings.ref_kl_cap;
  params.log_ratio_cap = std::numeric_limits<E>::max();
  params.largest_log_ratio = has_cap ? std::numeric_limits<E>::max() : kMaxLog<E>;
  Token<T> student = blank_token<T>();
  student.trainer_logprob = token.trainer_logprob;
  student.inference_logprob = token.inference_logprob;
  student.teacher_logprob = token.ref_logprob;
  student.weight = token.ref_kl_weight;
  student.active = token.ref_kl_weight != E(0);
  return token_loss<Rules::kAny>(student, params);
}

// Adds a token to the sums and returns d loss / d trainer_logprob of both components.
template <typename T>
IPO_HOST_DEVICE T add_components(ComponentSums<T>& total, const ComponentToken<T>& token,
                                 const ComponentParams<Element<T>>& params) {
  using L = Lanes<T>;
  const TokenLoss<T> ce = cross_entropy(token, params);
  total.counts[component_count::ce_tokens] += L::ones(ce.active);
  total.counts[component_count::ce_kept] += L::ones(ce.kept);
  total.sums[component_sum::ce_loss] += L::widen(ce.pg_loss);
  total.sums[component_sum::nll] += L::widen(select<T>(ce.kept, -token.trainer_logprob, T{}));

  const TokenLoss<T> ref_kl = distillation(token, params);
  const Mask<T> counted = ref_kl.active & ref_kl.finite;
  const Mask<T> masked = L::and_not(counted, ref_kl.kept);
  const T distance = token.ref_logprob - token.trainer_logprob;
  total.counts[component_count::ref_kl_tokens] += L::ones(ref_kl.active);
  total.counts[component_count::ref_kl_finite] += L::ones(counted);
  total.counts[component_count::ref_kl_kept] += L::ones(ref_kl.kept);
  total.sums[component_sum::ref_kl_loss] += L::widen(ref_kl.pg_loss + ref_kl.kl_loss);
  total.sums[component_sum::ref_kl] += L::widen(select<T>(counted, distance, T{}));
  total.sums[component_sum::ref_kl_mismatch_kl_kept] +=
      L::widen(select<T>(ref_kl.kept, ref_kl.mismatch_kl, T{}));
  total.sums[component_sum::ref_kl_mismatch_kl_masked] +=
      L::widen(select<T>(masked, ref_kl.mismatch_kl, T{}));
  return ce.gradient + ref_kl.gradient;
}

// The same over a whole batch, whose counts may not fit 32 bits.
struct ComponentTotals {
  double sums[component_sum::kNumRows];
  double counts[component_count::kNumRows];
};

template <typename E>
IPO_HOST_DEVICE ComponentTotals to_totals(const ComponentSums<E>& tokens) {
  ComponentTotals totals;
  for (int row = 0; row < component_sum::kNumRows; ++row) totals.sums[row] = tokens.sums[row];
  for (int row = 0; row < component_count::kNumRows; ++row) totals.counts[row] = tokens.counts[row];
  return totals;
}

IPO_HOST_DEVICE ComponentTotals merge(ComponentTotals a, const ComponentTotals& b) {
  for (int row = 0; row < component_sum::kNumRows; ++row) a.sums[row] += b.sums[row];
  for (int row = 0; row < component_count::kNumRows; ++row) a.counts[row] += b.counts[row];
  return a;
}

#define IPO_EXT_COUNT(name) \
  [[maybe_unused]] const double name = totals.counts[component_count::name];
#define IPO_EXT_SUM(name) [[maybe_unused]] const double name = totals.sums[component_sum::name];
#define IPO_EXT_MEAN(name, numerator, denominator) \
  if (row == component_mean::name) return ratio_or_zero(numerator, denominator);

// Returns the mean of a row of component_mean.
IPO_HOST_DEVICE double mean_of(const ComponentTotals& totals, int row) {
  IPO_EXT_COMPONENT_COUNTS(IPO_EXT_COUNT)
  IPO_EXT_COMPONENT_SUMS(IPO_EXT_SUM)
  IPO_EXT_COMPONENT_MEANS(IPO_EXT_MEAN)
  return 0;
}

#undef IPO_EXT_MEAN
#undef IPO_EXT_SUM
#undef IPO_EXT_COUNT

}  // namespace ipo_ext::math
