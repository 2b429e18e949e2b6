// The softmax of one row of logits: softcap and temperature, its sums, and what they make of a
// token: its log-probability, the row's entropy, and their derivatives by every logit. The maximum
// is known first, so each logit costs one exponential.
#pragma once

#include <cmath>
#include <limits>

#include "math/exponential.h"
#include "math/lanes.h"

namespace ipo_ext::math {

// A temperature beyond this or its inverse counts as the nearer of the two. The softmax is its
// limit by then; where 1 / T is infinite or 0, the argument 0 / T or -inf / T would be NaN.
template <typename E>
constexpr double kHighestTemperature = sizeof(E) == sizeof(float) ? 1e30 : 1e300;

// How raw logits z become the softmax's arguments: u = softcap * tanh(z / softcap), then u / T.
template <typename E>
struct LogitScale {
  E softcap;  // 0 for none
  E inverse_temperature;
};

template <typename T>
struct CappedLogit {
  T value;       // u
  T derivative;  // du / dz
};

// Caps a logit. With e = exp(-2 |z| / c), tanh = (1 - e) / (1 + e), whose derivative is
// 4 e / (1 + e)^2. Near 0, where e - 1 would cancel, it comes from exp(x) - 1 - x.
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

// Sums over a row of exp(x) and exp(x) * x with x = (u - row_max) / T, row_max the largest u.
struct RowSums {
  double sum_exp;
  double sum_exp_x;
};

IPO_HOST_DEVICE RowSums merge(const RowSums& a, const RowSums& b) {
  return {a.sum_exp + b.sum_exp, a.sum_exp_x + b.sum_exp_x};
}

// The maximum and the sums of a row, or of a split of it, and the label's logit, which must be read
// before any gradient is written.
template <typename E>
struct RowStats {
  E row_max;
  E label_logit;
  RowSums sums;
};

// Returns what exponentials are relative to: the maximum, or any number for a row of nothing but
// -inf, which has none.
template <typename E>
IPO_HOST_DEVICE E finite_or_zero(E row_max) {
  return row_max == -std::numeric_limits<E>::infinity() ? E(0) : row_max;
}

// Takes the sums of a split of a row, which are relative to the split's own maximum, to the row's
// maximum, which is -shift higher. A split of nothing but -inf has no maximum, and adds nothing.
IPO_HOST_DEVICE RowSums shifted(const RowSums& split, double shift) {
  if (split.sum_exp == 0) return {0, 0};
  const double factor = exponential(shift).exp;
  return {factor * split.sum_exp, factor * (split.sum_exp_x + shift * split.sum_exp)};
}

template <typename T>
struct RowTerm {
  T x;    // no less than kVanishing
  T exp;  // exp(x), 0 from kVanishing down: for a logit of -inf, too
};

// Makes a logit's term. The difference is taken before the temperature divides it: an offset common
// to all logits, however large, costs no digits.
template <typename T>
IPO_HOST_DEVICE RowTerm<T> row_term(T capped, Element<T> row_max, Element<T> inverse_temperature) {
  const T unbounded = (capped - row_max) * inverse_temperature;
  const T lowest = splat<T>(kVanishing<Element<T>>);
  const T x = select<T>(unbounded < lowest, lowest, unbounded);
  return {x, exponential_of_nonpositive(x)};
}

// A term in powers of 2, where those are what the device computes: a multiplication less. The scale
// is log2(e) / T, and the term holds x / log(2).
template <typename E>
IPO_HOST_DEVICE E binary_scale(E inverse_temperature) {
  return inverse_temperature * ExponentialConstants<E>::kLog2E;
}
template <typename E>
IPO_HOST_DEVICE RowTerm<E> binary_row_term(E logit, E row_max, E scale) {
  constexpr E kLowest = -static_cast<E>(ExponentialConstants<E>::kBias);
  const E unbounded = (logit - row_max) * scale;
  const E x = unbounded < kLowest ? kLowest : unbounded;
  return {x, power_of_2(x)};
}

template <typename T>
IPO_HOST_DEVICE T exp_x(const RowTerm<T>& term) {
  return term.exp * term.x;
}

// A term in powers of 2 by one fused multiply-add, for logits of 16 bits: x / log(2) is
// logit * scale - offset, relative to an offset beside the maximum.
struct FusedScale {
  float scale;
  float offset;
  bool saturated;  // every logit below the maximum vanishes
};

// kSignificandBits: of a logit. Where the maximum is far from 0, the next logit of so few bits is
// more than 127 below it in powers of 2. A scale of 12 bits is enough for such a row, and makes its
// offset exact; it is as small as the offset needs to be finite.
template <int kSignificandBits>
IPO_HOST_DEVICE FusedScale fused_scale(float row_max, float scale) {
  constexpr float kFar = 128 << kSignificandBits;
  constexpr float kHighestOffset = 1.329227996e36f;  // 2^120
  constexpr uint32_t kLowestBits = 0xfff;
  const float magnitude = row_max < 0 ? -row_max : row_max;
  if (magnitude * scale < kFar) return {scale, row_max * scale, false};
  const float highest = kHighestOffset / magnitude;
  const float short_scale =
      bit_cast<float>(bit_cast<uint32_t>(scale < highest ? scale : highest) & ~kLowestBits);
  return {short_scale, row_max * short_scale, true};
}
IPO_HOST_DEVICE RowTerm<float> fused_row_term(float logit, const FusedScale& fused) {
  const float x = fmaf(logit, fused.scale, -fused.offset);
  return {x, power_of_2_or_zero(x)};
}

constexpr double kLn2 = 1 / ExponentialConstants<double>::kLog2E;

// Returns how much lower x is relative to the maximum than relative to the offset: at most 0.006.
IPO_HOST_DEVICE double shift_of(const FusedScale& fused, float row_max) {
  const double exact = static_cast<double>(row_max) * fused.scale;
  return (fused.offset - exact) * kLn2;
}

// Computes exp(shift) to 1e-10 of it, for a shift of shift_of().
IPO_HOST_DEVICE double small_exponential(double shift) {
  return 1 + shift * (1 + shift * (0.5 + shift * (1.0 / 6)));
}

// Takes a row's sums from the offset to the maximum, whose own term is then exactly 1: no rounding
// of others' exponentials is left in a row where it has all of the probability.
IPO_HOST_DEVICE RowSums relative_to_max(const RowSums& sums, const FusedScale& fused,
                                        float row_max) {
  const RowTerm<float> of_max = fused_row_term(row_max, fused);
  const double shift = shift_of(fused, row_max);
  const double factor = small_exponential(shift);
  const double others = sums.sum_exp - of_max.exp;
  const double others_x = sums.sum_exp_x - exp_x(of_max) * kLn2;
  return {1 + factor * others, factor * (others_x + shift * others)};
}

// What a row says of its token: NaN in both where it holds NaN or +inf, or nothing but -inf.
template <typename E>
struct RowResult {
  E logprob;
  E entropy;
};

// Makes a row's result. The label's x stays apart from the logarithm until the end: row_max plus a
// logarithm would lose the logarithm's digits.
template <typename E>
IPO_HOST_DEVICE RowResult<E> row_result(const RowSums& sums, double label_x) {
  const double log_sum = log(sums.sum_exp);
  return {static_cast<E>(label_x - log_sum),
          static_cast<E>(log_sum - sums.sum_exp_x / sums.sum_exp)};
}

// The gradients that flow into a row: by its log-probability and by its entropy.
template <typename E>
struct RowGrads {
  E logprob;
  E entropy;

  IPO_HOST_DEVICE bool are_zero() const { return logprob == 0 && entropy == 0; }
};

// Bounds each of a row's derivatives by its logits: of the log-probability they are no more than 1,
// of the entropy p |log p + H| <= 1 + H, both over the temperature.
template <typename E>
IPO_HOST_DEVICE E derivative_bound(const RowGrads<E>& grads, E entropy, E inverse_temperature) {
  const E by_logprob = grads.logprob < 0 ? -grads.logprob : grads.logprob;
  const E by_entropy = grads.entropy < 0 ? -grads.entropy : grads.entropy;
  return (by_logprob + by_entropy * (1 + entropy)) * inverse_temperature;
}

// A power of two and its inverse.
struct RowScale {
  float scale;
  float inverse;
};

// Returns the power of two over which numbers up to `bound` lie just below fp16's largest. Nothing
// else could be both as exact and free of overflow: fp16 has 2^40 between its ends. From
// 2^-112 down the scale stays; infinities and NaNs are left as they are.
IPO_HOST_DEVICE RowScale fp16_scale(float bound) {
  constexpr uint32_t kMantissaBits = 23, kLargest = 14, kInfinite = 255;
  const uint32_t exponent = bit_cast<uint32_t>(bound) >> kMantissaBits;
  if (exponent >= kInfinite) return {1, 1};
  const uint32_t scale = exponent > kLargest ? exponent - kLargest : 1;
  return {bit_cast<float>(scale << kMantissaBits), bit_cast<float>((254 - scale) << kMantissaBits)};
}

// A row's derivative by its logits: d(log p_y)/ds_j = [j = y] - p_j and
// dH/ds_j = -p_j (log p_j + H), where s are the softmax's arguments.
template <typename E>
struct RowDerivative {
  RowGrads<E> grads;
  E inverse_sum;
  E entropy_offset;  // H - log(sum): log p_j + H = x_j + entropy_offset
  E inverse_temperature;

  // Returns the derivative by a logit that is not the label, given du/dz.
  template <typename T>
  IPO_HOST_DEVICE T other(const RowTerm<T>& term, T du_dz) const {
    T inner = splat<T>(grads.logprob);
    if (grads.entropy != 0) inner = inner + grads.entropy * (term.x + entropy_offset);
    const T p = term.exp * inverse_sum;
    return select<T>(term.exp == E(0), T{}, -p * (inner * (du_dz * inverse_temperature)));
  }

  // Returns what an exponential is multiplied by to give other(), in a row without a softcap into
  // which no entropy flows.
  IPO_HOST_DEVICE E factor() const { return -(grads.logprob * inverse_temperature) * inverse_sum; }

  // Returns the derivative by the label's logit: 0 where the label has all of the probability.
  IPO_HOST_DEVICE E label(const RowTerm<E>& term, E du_dz) const {
    return other(term, du_dz) + rounded_product(grads.logprob, du_dz * inverse_temperature);
  }
};

template <typename E>
IPO_HOST_DEVICE RowDerivative<E> row_derivative(const RowGrads<E>& grads, double sum, E entropy,
                                                E inverse_temperature) {
  return {grads, static_cast<E>(1 / sum), static_cast<E>(entropy - log(sum)), inverse_temperature};
}

}  // namespace ipo_ext::math
