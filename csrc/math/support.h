// The softmax over a row's support S, the part of the vocabulary that the sampler drew from: the
// derivative of its log-probability, beside that of the entropy, which stays the whole row's.
#pragma once

#include "math/softmax_row.h"

namespace ipo_ext::math {

// What only calls that know of a support measure, behind the rows of math/metrics.h in `sums`,
// first counts of tokens, and in `means`, divided by the active ones.
#define IPO_EXT_REPLAY_COUNTS(X) \
  X(replayed)                    \
  X(nonfinite_entropy)

#define IPO_EXT_REPLAY_ROWS(X) \
  IPO_EXT_REPLAY_COUNTS(X)     \
  X(centering_loss)

#define IPO_EXT_ENUMERATOR(name) name,
namespace replay {
enum Row : int { IPO_EXT_REPLAY_ROWS(IPO_EXT_ENUMERATOR) kNumRows };
enum Count : int { kNumCounts = centering_loss };
}  // namespace replay
#undef IPO_EXT_ENUMERATOR

// The derivative by logits of which a row gives log-probabilities, over its support or, where that
// is everything, over the whole row. With g_k the gradients by the log-probabilities of ids k and G
// their sum, it is g_j - G p_j, times du/dz / T, beside what the entropy adds.
template <typename E>
struct SupportDerivative {
  LogitScale<E> scale;
  E support_max;                // of the capped logits of S
  RowDerivative<E> of_support;  // of the log-probabilities, whose gradient is G
  E row_max;                    // of the whole row
  RowDerivative<E> of_row;      // of the entropy; not read where none of its gradient flows

  // Returns the derivative by a logit whose own log-probability has the gradient `own`.
  IPO_HOST_DEVICE E at(E logit, E own) const {
    const CappedLogit<E> capped = cap_logit(logit, scale.softcap);
    const RowTerm<E> term = row_term(capped.value, support_max, scale.inverse_temperature);
    const E by_logprobs = of_support.other(term, capped.derivative) +
                          rounded_product(own, capped.derivative * scale.inverse_temperature);
    if (of_row.grads.entropy == 0) return by_logprobs;
    return by_logprobs + of_row.other(row_term(capped.value, row_max, scale.inverse_temperature),
                                      capped.derivative);
  }
};

}  // namespace ipo_ext::math
