// Judges whole sequences: what is summed over a sequence's active tokens, the statistics that rules
// compare with bounds, and the verdict, by which a sequence is dropped or weighed.
#pragma once

#include <limits>

#include "math/exponential.h"
#include "math/lanes.h"

namespace ipo_ext::math {

// The estimators of a token's mismatch KL, of its log-ratio x: k1 = x, k2 = x^2 / 2, k3 = r - 1 - x
// (http://joschu.net/blog/kl-approx.html).
namespace estimator {
enum Row : int { k1, k2, k3, kNumRows };
}
namespace reduction {
enum Row : int { sum, mean, max, min, kNumRows };
}

// Reductions of an estimator over a sequence, numbered estimator * kNumRows + reduction: the order
// of Python's config.SequenceStatistic.
constexpr int kNumStatistics = estimator::kNumRows * reduction::kNumRows;

// Of x: what the weight of a sequence is the exponential of.
enum class SequenceWeight : int32_t { kNone, kSum, kMean, kCount };

// A sequence is dropped where the statistic leaves [low, high].
struct SequenceRule {
  int statistic;
  double low, high;

  IPO_HOST_DEVICE estimator::Row estimator() const {
    return static_cast<estimator::Row>(statistic / reduction::kNumRows);
  }
  IPO_HOST_DEVICE reduction::Row reduction() const {
    return static_cast<reduction::Row>(statistic % reduction::kNumRows);
  }
};

struct SequenceRules {
  SequenceRule rules[kNumStatistics];
  int count;
  bool only_negative;  // what breaks one loses its tokens of negative advantage, not all
  SequenceWeight weight;
  double weight_cap;

  IPO_HOST_DEVICE bool use(estimator::Row k) const {
    bool found = false;
    for (int i = 0; i < count; ++i) found |= rules[i].estimator() == k;
    return found;
  }
};

// What is known of a sequence's active tokens. T is a scalar or, while a SIMD loop runs, a vector.
template <typename T>
struct SequenceSums {
  Wide<T> sums[estimator::kNumRows];  // of k1, 2 k2 = x^2 and k3; the half is taken at the end
  // Of x, |x| and k3, NaN aside; +inf over nothing. |x| stands for k2, whose square loses digits.
  T smallest[estimator::kNumRows];
  T largest[estimator::kNumRows];     // likewise; -inf over nothing
  typename Lanes<T>::Count active;    // fewer than 2^32
  typename Lanes<T>::Count negative;  // active tokens of negative advantage
};

template <typename T>
IPO_HOST_DEVICE SequenceSums<T> empty_sequence_sums() {
  SequenceSums<T> empty = {};
  for (int k = 0; k < estimator::kNumRows; ++k) {
    empty.smallest[k] = splat<T>(std::numeric_limits<Element<T>>::infinity());
    empty.largest[k] = splat<T>(-std::numeric_limits<Element<T>>::infinity());
  }
  return empty;
}

// Returns r - 1 - x: infinite where r overflows or x is infinite, NaN where x is.
template <typename T>
IPO_HOST_DEVICE T measured_k3(T x) {
  using E = Element<T>;
  const Mask<T> finite = (x >= -std::numeric_limits<E>::max()) & (x <= kMaxLog<E>);
  const Exponential<T> e = exponential(x);
  const T far = e.exp - E(1) - x;  // cancels nothing there
  const T k3 = select<T>(x > E(kMeasureClamp), far, e.exp_minus_1_minus_x);
  return select<T>(finite, k3, x * x * std::numeric_limits<E>::infinity());
}

template <typename T>
IPO_HOST_DEVICE void add_estimate(SequenceSums<T>& sequence, estimator::Row k, T value,
                                  Mask<T> active) {
  const Wide<T> wide = Lanes<T>::widen(select<T>(active, value, T{}));
  sequence.sums[k] += k == estimator::k2 ? wide * wide : wide;
  sequence.smallest[k] =
      smaller(select<T>(active, value, sequence.smallest[k]), sequence.smallest[k]);
  sequence.largest[k] = larger(select<T>(active, value, sequence.largest[k]), sequence.largest[k]);
}

// What is wanted beside k1 and the number of active tokens; nothing else is summed.
struct WantedSums {
  bool k2, k3, negative;
};

IPO_HOST_DEVICE WantedSums wanted_by(const SequenceRules& rules) {
  return {rules.use(estimator::k2), rules.use(estimator::k3), rules.only_negative};
}

template <typename T>
IPO_HOST_DEVICE void add_to_sequence(SequenceSums<T>& sequence, T x, T advantage, Mask<T> active,
                                     const WantedSums& wanted) {
  add_estimate(sequence, estimator::k1, x, active);
  if (wanted.k2) add_estimate(sequence, estimator::k2, larger(x, -x), active);
  if (wanted.k3) add_estimate(sequence, estimator::k3, measured_k3(x), active);
  sequence.active += Lanes<T>::ones(active);
  if (wanted.negative) sequence.negative += Lanes<T>::ones(active & (advantage < Element<T>(0)));
}

template <typename E>
IPO_HOST_DEVICE SequenceSums<E> merge(SequenceSums<E> a, const SequenceSums<E>& b) {
  for (int k = 0; k < estimator::kNumRows; ++k) {
    a.sums[k] += b.sums[k];
    a.smallest[k] = smaller(a.smallest[k], b.smallest[k]);
    a.largest[k] = larger(a.largest[k], b.largest[k]);
  }
  a.active += b.active;
  a.negative += b.negative;
  return a;
}

IPO_HOST_DEVICE bool is_finite(double value) {
  return value >= -std::numeric_limits<double>::max() &&
         value <= std::numeric_limits<double>::max();
}

// Returns rows[k] by selection: an index would move all rows from registers to memory.
template <typename V>
IPO_HOST_DEVICE double row_of(const V (&rows)[estimator::kNumRows], estimator::Row k) {
  const double first = rows[estimator::k1], second = rows[estimator::k2];
  return k == estimator::k1 ? first : k == estimator::k2 ? second : double(rows[estimator::k3]);
}

template <typename E>
IPO_HOST_DEVICE double statistic_of(const SequenceSums<E>& sequence, estimator::Row k,
                                    reduction::Row reduction) {
  const double half = k == estimator::k2 ? 0.5 : 1;
  if (reduction == reduction::min || reduction == reduction::max) {
    const double extreme =
        reduction == reduction::min ? row_of(sequence.smallest, k) : row_of(sequence.largest, k);
    return k == estimator::k2 ? half * extreme * extreme : extreme;
  }
  const double sum = half * row_of(sequence.sums, k);
  return reduction == reduction::mean ? sum / sequence.active : sum;
}

// A sum or a mean that is not finite breaks every rule. The smallest and the largest pass over NaN,
// and where there is nothing else no rule is broken.
template <typename E>
IPO_HOST_DEVICE bool breaks(const SequenceRule& rule, const SequenceSums<E>& sequence) {
  const estimator::Row k = rule.estimator();
  const reduction::Row reduction = rule.reduction();
  const double value = statistic_of(sequence, k, reduction);
  const bool within = value >= rule.low && value <= rule.high;
  if (reduction == reduction::sum || reduction == reduction::mean)
    return !(within && is_finite(value));
  return row_of(sequence.smallest, k) <= row_of(sequence.largest, k) && !within;
}

// Returns the weight of a sequence's tokens, NaN where there is none: the statistic is not finite,
// or E does not hold its exponential.
template <typename E>
IPO_HOST_DEVICE double sequence_weight(const SequenceSums<E>& sequence,
                                       const SequenceRules& rules) {
  const double log_weight =
      statistic_of(sequence, estimator::k1,
                   rules.weight == SequenceWeight::kSum ? reduction::sum : reduction::mean);
  const double uncapped = log_weight > kMaxLog<double> ? std::numeric_limits<double>::infinity()
                                                       : exponential(log_weight).exp;
  const double weight = smaller(uncapped, rules.weight_cap);
  const bool exists = is_finite(log_weight) && weight <= std::numeric_limits<E>::max();
  return exists ? weight : std::numeric_limits<double>::quiet_NaN();
}

// What becomes of a sequence.
struct SequenceVerdict {
  double weight = 1;          // of all its tokens
  double dropped_tokens = 0;  // active ones that a rule or the weight drops, the rollout rule aside
  bool rollout_dropped = false;
  bool drops_all = false;
  bool drops_negative = false;  // the tokens of negative advantage
};

// `piece` is the part of the sequence whose tokens are at hand and counted. `rollout_low` is the
// log-ratio below which one active token drops its sequence.
template <typename E>
IPO_HOST_DEVICE SequenceVerdict judge(const SequenceSums<E>& sequence, const SequenceSums<E>& piece,
                                      const SequenceRules& rules, double rollout_low) {
  SequenceVerdict verdict;
  if (sequence.active == 0) return verdict;
  bool broken = false;
  for (int i = 0; i < rules.count; ++i) broken |= breaks(rules.rules[i], sequence);
  bool drops_all = broken && !rules.only_negative;
  if (rules.weight != SequenceWeight::kNone) {
    const double weight = sequence_weight(sequence, rules);
    drops_all |= weight != weight;
    if (!drops_all) verdict.weight = weight;
  }
  verdict.drops_negative = broken && rules.only_negative;
  verdict.dropped_tokens = drops_all ? piece.active : verdict.drops_negative ? piece.negative : 0;
  verdict.rollout_dropped = sequence.smallest[estimator::k1] < rollout_low;
  verdict.drops_all = drops_all | verdict.rollout_dropped;
  return verdict;
}

template <typename E>
IPO_HOST_DEVICE SequenceVerdict judge(const SequenceSums<E>& sequence, const SequenceRules& rules,
                                      double rollout_low) {
  return judge(sequence, sequence, rules, rollout_low);
}

// How the statistics of many sequences lie in memory, all in fp64: rows of what is added (k1, 2 k2
// and k3, then active and negative tokens) and rows of extremes (the smallest of each estimator,
// then the largest). Of pieces that several calls have: the rows of whole sequences, then active
// and negative tokens of the piece.
namespace statistics {
constexpr int kActive = estimator::kNumRows;
constexpr int kNegative = kActive + 1;
constexpr int kNumSums = kNegative + 1;
constexpr int kNumExtremes = 2 * estimator::kNumRows;
constexpr int kPieceActive = kNumSums + kNumExtremes;
constexpr int kPieceNegative = kPieceActive + 1;
constexpr int kNumTotals = kPieceNegative + 1;
}  // namespace statistics

}  // namespace ipo_ext::math
