// Computes what one token pays: its loss, the derivative, and the mask rule that decides whether it
// pays at all. Nothing is multiplied by a mask: a token that is not kept selects exact zeros, so
// nothing it holds can reach a result.
#pragma once

#include <limits>

#include "math/exponential.h"
#include "math/lanes.h"
#include "math/mask_rules.h"
#include "math/settings.h"

namespace ipo_ext::math {

// Returns 1 / normalizer for the gradient and the loss. 0 stands for "loss 0, gradients 0" (a
// normalizer of 0), NaN for "poison every gradient" (a normalizer that is no count: negative or
// NaN). One whose inverse E cannot hold counts as the smallest whose inverse it can: an infinite
// one would make NaN of tokens that pay nothing.
template <typename E>
IPO_HOST_DEVICE double inverse_normalizer(double normalizer) {
  if (normalizer == 0) return 0;
  if (!(normalizer > 0)) return std::numeric_limits<double>::quiet_NaN();
  constexpr double kMost = std::numeric_limits<E>::max();
  return 1 / normalizer < kMost ? 1 / normalizer : kMost;
}

// What a token has besides the policy's log-probability, listed once: its member of Token, the
// tensor that holds it and, for one that may be absent, what then stands for it. The kernels'
// arguments and loads are made from the list. REQUIRED and OPTIONAL are X(member, tensor) and
// X(member, tensor, absent).
#define IPO_EXT_TOKEN_INPUTS(REQUIRED, OPTIONAL)  \
  REQUIRED(inference_logprob, inference_logprobs) \
  REQUIRED(advantage, advantages)                 \
  OPTIONAL(teacher_logprob, teacher_logprobs, 0)  \
  OPTIONAL(weight, loss_weights, 1)

#define IPO_EXT_MEMBER(member, ...) T member;

template <typename T>
struct Token {
  T trainer_logprob;
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_MEMBER, IPO_EXT_MEMBER)
  Mask<T> active;  // the loss mask
  T entropy;       // anything where no logits were seen
};

#undef IPO_EXT_MEMBER

#define IPO_EXT_ZERO(member, tensor) T{},
#define IPO_EXT_ABSENT(member, tensor, absent) splat<T>(absent),

// An inactive token that has none of its optional inputs.
template <typename T>
IPO_HOST_DEVICE Token<T> blank_token() {
  return {T{}, IPO_EXT_TOKEN_INPUTS(IPO_EXT_ZERO, IPO_EXT_ABSENT) Mask<T>{}, T{}};
}

#undef IPO_EXT_ABSENT
#undef IPO_EXT_ZERO

template <typename T>
struct TokenLoss {
  Mask<T> active;
  Mask<T> kept;
  Mask<T> finite;       // neither the log-ratio nor a ratio that is not bounded overflows
  Mask<T> masked_high;  // active and dropped on the high side; by the ratio's band, an infinite
                        // ratio too
  Mask<T> masked_low;   // active and dropped on the low side
  T log_ratio;
  T ratio;          // what it counts as: capped or clipped where the policy form does that; 0
                    // unless kept
  T mismatch_kl;    // r - 1 - x, with x clamped to kMeasureClamp
  T pg_loss;        // exactly 0 unless kept
  T kl_loss;        // exactly 0 unless kept or, where the KL's scope is wider, active and finite
  T gradient;       // d loss / d trainer_logprob, divided by the normalizer
  Mask<T> clipped;  // active, finite and where the policy form clips the ratio
  Mask<T> capped;   // likewise, where it caps it
};

// What a caller knows of its tokens and settings. Tame ones give the same bits with fewer
// instructions: log-ratios of active tokens are within kTame of 0, so that no ratio overflows and
// nothing that is compared is NaN, and neither adv_tau nor the normalizer is 0.
enum class Tokens { kAny, kTame };

// An inactive one of the tame tokens has a log-ratio of 0.
template <Tokens kTokens = Tokens::kAny, typename T>
IPO_HOST_DEVICE T log_ratio(const Token<T>& token) {
  const T x = token.trainer_logprob - token.inference_logprob;
  if constexpr (kTokens == Tokens::kTame) return select<T>(token.active, x, T{});
  return x;
}

// The argument exponential_x is exponential(log_ratio(token)), which a caller may have made
// earlier.
template <Rules kRules, typename T, Tokens kTokens = Tokens::kAny>
IPO_HOST_DEVICE TokenLoss<T> token_loss(const Token<T>& token, const Exponential<T>& exponential_x,
                                        const LossParams<Element<T>>& params) {
  using E = Element<T>;
  constexpr bool kIsTame = kTokens == Tokens::kTame;
  const T x = log_ratio<kTokens>(token);

  const E largest = kRules == Rules::kAny ? params.largest_log_ratio : kMaxLog<E>;
  Mask<T> finite;
  if constexpr (kIsTame) {
    finite = true;
  } else {
    finite = (x >= -std::numeric_limits<E>::max()) & (x <= largest);
  }
  const MaskDecision<T> decision = mask_decision<kRules, T>(
      {token.trainer_logprob, token.inference_logprob, x, token.advantage, token.active, finite},
      params.mask_rule, params.low, params.high);
  Mask<T> kept = decision.kept;
  Mask<T> pays_kl = kept;
  if constexpr (kRules == Rules::kAny) {
    if (params.kl_active) pays_kl = token.active & finite;
    if (params.sequence.drops_all) kept = pays_kl = Mask<T>{};
    if (params.sequence.drops_negative) {
      kept = Lanes<T>::and_not(kept, token.advantage < E(0));
      pays_kl = Lanes<T>::and_not(pays_kl, token.advantage < E(0));
    }
  }
  T mismatch_kl = exponential_x.exp_minus_1_minus_x;
  if constexpr (!kIsTame) {
    mismatch_kl = select<T>(x > E(kMeasureClamp), splat<T>(E(kExpAtMeasureClamp)), mismatch_kl);
  }

  // A term whose tau is 0 is not evaluated: whatever its input holds is harmless.
  T push = kIsTame || params.adv_tau != 0 ? rounded_product(params.adv_tau, token.advantage) : T{};
  if (params.teacher_tau != 0) {
    push =
        push + rounded_product(params.teacher_tau, token.teacher_logprob - token.trainer_logprob);
  }

  // What a token that pays nothing holds is replaced before it is used. A token of weight 0 pays
  // nothing: where a product overflows, 0 times it would be NaN.
  T weight = kRules == Rules::kAny ? token.weight * E(params.sequence.weight) : token.weight;
  weight = select<T>(pays_kl, weight, splat<T>(E(1)));
  const Mask<T> weighs = weight != E(0);
  const T advantage = select<T>(kept & weighs, push, T{});
  const T ratio = select<T>(kept, exponential_x.exp, T{});
  const T kl_x = select<T>(pays_kl, x, T{});
  const T tau_x = rounded_product(select<T>(weighs, splat<T>(params.kl_tau), T{}), kl_x);

  // The formula and its derivative (docs/math.md): d(-A r)/dx = -A r, d(tau x^2)/dx = 2 tau x.
  const PolicyInput<T> policy = {token.trainer_logprob, x, ratio, advantage, push};
  PolicyTerm<T> pg = ratio_term(policy);
  T pg_loss = weight * pg.loss;
  if constexpr (kRules == Rules::kAny) {
    pg = policy_term(policy, params.pg_form, params.policy_bounds());
    pg_loss = select<T>(kept, weight * pg.loss, T{});
    pg.derivative = select<T>(kept, pg.derivative, T{});
    pg.ratio = select<T>(kept, pg.ratio, T{});
  }
  const T kl_loss = weight * rounded_product(tau_x, kl_x);
  const T derivative = weight * multiply_add(E(2), tau_x, pg.derivative);
  const T gradient = kIsTame || params.inv_normalizer != 0
                         ? rounded_product(derivative, splat<T>(params.inv_normalizer))
                         : T{};

  const Mask<T> counted = token.active & finite;
  const Mask<T> clipped = counted & pg.clipped;
  const Mask<T> capped = counted & pg.capped;
  return {token.active,
          kept,
          finite,
          decision.masked_high,
          decision.masked_low,
          x,
          pg.ratio,
          mismatch_kl,
          pg_loss,
          kl_loss,
          gradient,
          clipped,
          capped};
}

template <Rules kRules, Tokens kTokens = Tokens::kAny, typename T>
IPO_HOST_DEVICE TokenLoss<T> token_loss(const Token<T>& token,
                                        const LossParams<Element<T>>& params) {
  const T x = log_ratio<kTokens>(token);
  const auto exponential_x = kTokens == Tokens::kTame ? exponential_of_tame(x) : exponential(x);
  return token_loss<kRules, T, kTokens>(token, exponential_x, params);
}

}  // namespace ipo_ext::math
