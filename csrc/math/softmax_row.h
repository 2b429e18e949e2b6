// One row of logits: softcap and temperature, the softmax's sums, and what they make of a token:
// its log-probability, the row's entropy, and their derivatives by every logit. The maximum is
// known first, so each logit costs one exponential.
#pragma once

#include <cmath>

#include "math/exponential.h"
#include "math/lanes.h"

namespace ipo_ext::math {

// How raw logits become the softmax's arguments: u = softcap * tanh(z / softcap), then u / T.
template <typename E>
struct LogitScale {
  E softcap;  // 0 for none
  E inverse_temperature;
};

template <typename T>
struct CappedLogit {
  T value;  // u
  T slope;  // du / dz
};

// With e = exp(-2 |z| / c): tanh = (1 - e) / (1 + e), whose derivative is 4 e / (1 + e)^2. Near 0,
// where e - 1 would cancel, it comes from exp(x) - 1 - x.
template <typename T>
IPO_HOST_DEVICE CappedLogit<T> cap_logit(T z, Element<T> softcap) {
  using E = Element<T>;
  if (softcap == 0) return {z, splat<T>(E(1))};
  const T magnitude = select<T>(z < E(0), -z, z) / softcap;
  const T x = E(-2) * select<T>(magnitude > E(1000), splat<T>(E(1000)), magnitude);
  const Exponential<T> e = exponential(x);
  const T minus = select<T>(x < E(-0.5), e.exp - E(1), e.exp_minus_1_minus_x + x);  // e - 1
  const T plus = minus + E(2);                                                      // e + 1
  const T value = rounded_product<T>(softcap, -minus / plus);
  return {select<T>(z < E(0), -value, value), E(4) * e.exp / (plus * plus)};
}

// Sums over a row of exp(d) and exp(d) * d, d = (u - the largest u) / T.
struct RowSums {
  double exponentials;
  double weighted;
};

IPO_HOST_DEVICE RowSums merge(const RowSums& a, const RowSums& b) {
  return {a.exponentials + b.exponentials, a.weighted + b.weighted};
}

// The sums of a part of a row, taken relative to the part's own maximum, which is `shift` below the
// row's. A part of nothing but -inf has no maximum, and adds nothing.
IPO_HOST_DEVICE RowSums shifted(const RowSums& part, double shift) {
  if (part.exponentials == 0) return {0, 0};
  const double factor = exponential(shift).exp;
  return {factor * part.exponentials, factor * (part.weighted + shift * part.exponentials)};
}

template <typename T>
struct RowTerm {
  T distance;     // d, no less than kVanishing
  T exponential;  // exp(d), 0 from there on: for a logit of -inf, too
};

// The difference is taken before the temperature divides it: an offset common to all logits,
// however large, costs no digits.
template <typename T>
IPO_HOST_DEVICE RowTerm<T> row_term(T capped, Element<T> largest, Element<T> inverse_temperature) {
  const T unbounded = (capped - largest) * inverse_temperature;
  const T lowest = splat<T>(kVanishing<Element<T>>);
  const T distance = select<T>(unbounded < lowest, lowest, unbounded);
  return {distance, exponential_of_nonpositive(distance)};
}

// The same in powers of 2, where those are what the device computes: a multiplication less. The
// scale is log2(e) / T, the distance d / log(2).
template <typename E>
IPO_HOST_DEVICE E binary_scale(E inverse_temperature) {
  return inverse_temperature * ExponentialConstants<E>::kLog2E;
}
template <typename E>
IPO_HOST_DEVICE RowTerm<E> binary_row_term(E logit, E largest, E scale) {
  constexpr E kLowest = -static_cast<E>(ExponentialConstants<E>::kBias);
  const E unbounded = (logit - largest) * scale;
  const E distance = unbounded < kLowest ? kLowest : unbounded;
  return {distance, power_of_2(distance)};
}

template <typename T>
IPO_HOST_DEVICE T weighted(const RowTerm<T>& term) {
  return term.exponential * term.distance;
}

// NaN in both where the row holds NaN or +inf, or nothing but -inf.
template <typename E>
struct RowResult {
  E logprob;
  E entropy;
};

// Distances stay apart from the logarithm until the end: the largest logit plus a logarithm would
// lose the logarithm's digits.
template <typename E>
IPO_HOST_DEVICE RowResult<E> row_result(const RowSums& sums, double label_distance) {
  const double log_sum = log(sums.exponentials);
  return {static_cast<E>(label_distance - log_sum),
          static_cast<E>(log_sum - sums.weighted / sums.exponentials)};
}

// What flows into a row: derivatives by its log-probability and by its entropy.
template <typename E>
struct RowSlopes {
  E logprob;
  E entropy;

  IPO_HOST_DEVICE bool are_zero() const { return logprob == 0 && entropy == 0; }
};

// d(log p_y)/ds_j = [j = y] - p_j and dH/ds_j = -p_j (log p_j + H), s the softmax's arguments.
template <typename E>
struct RowDerivative {
  RowSlopes<E> slopes;
  E inverse_sum;
  E entropy_offset;  // H - log(sum): log p_j + H = d_j + entropy_offset
  E inverse_temperature;

  // By a logit that is not the label, given du/dz.
  template <typename T>
  IPO_HOST_DEVICE T other(const RowTerm<T>& term, T slope) const {
    T inner = splat<T>(slopes.logprob);
    if (slopes.entropy != 0) inner = inner + slopes.entropy * (term.distance + entropy_offset);
    const T p = term.exponential * inverse_sum;
    return select<T>(term.exponential == E(0), T{}, -p * (inner * (slope * inverse_temperature)));
  }

  // The same for a row without a softcap into which no entropy flows: by this an exponential is
  // multiplied.
  IPO_HOST_DEVICE E factor() const { return -(slopes.logprob * inverse_temperature) * inverse_sum; }

  // 0 where the label has all of the probability.
  IPO_HOST_DEVICE E label(const RowTerm<E>& term, E slope) const {
    return other(term, slope) + rounded_product(slopes.logprob, slope * inverse_temperature);
  }
};

template <typename E>
IPO_HOST_DEVICE RowDerivative<E> row_derivative(const RowSlopes<E>& slopes, double sum, E entropy,
                                                E inverse_temperature) {
  return {slopes, static_cast<E>(1 / sum), static_cast<E>(entropy - log(sum)), inverse_temperature};
}

}  // namespace ipo_ext::math
