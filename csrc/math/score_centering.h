// Score centering (arXiv 2609.20807): what is taken from each token's update so that the sampler
// expects none, a sum over the ids that the sampler drew from (docs/math.md, "Score centering").
#pragma once

#include "math/exponential.h"
#include "math/sequence_rules.h"

namespace ipo_ext::math {

// The settings of the policy term whose expectation is taken: those of prob_diff and capped.
template <typename E>
struct CenteringParams {
  E largest_difference;  // of the probabilities, within which an id counts
  E log_ratio_cap;
  E adv_tau;
  E inv_normalizer;  // see inverse_normalizer
};

// Returns the weight of an id's log-probability, a constant: the sampler's probability q of it
// times the capped ratio. It is 0 for an id out of the trust region, and where either
// log-probability is not finite.
template <typename E>
IPO_HOST_DEVICE E centering_weight(E trainer_logprob, E inference_logprob,
                                   const CenteringParams<E>& params) {
  const E p = exponential(trainer_logprob).exp;
  const E q = exponential(inference_logprob).exp;
  const E difference = p > q ? p - q : q - p;
  const E log_ratio = trainer_logprob - inference_logprob;
  const bool counts = is_finite(log_ratio) & (difference <= params.largest_difference);
  return counts ? q * exponential(smaller(log_ratio, params.log_ratio_cap)).exp : E(0);
}

}  // namespace ipo_ext::math
