// Computes log(y) for positive normal numbers without a branch, a table or a libm call, as
// exponential.h does exp.
#pragma once

#include "math/lanes.h"

namespace ipo_ext::math {

template <typename E>
struct LogarithmConstants;

template <>
struct LogarithmConstants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: its low bits are an integer
  static constexpr int kTerms = 5;
};

template <>
struct LogarithmConstants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kTerms = 12;
};

// Splits y = 2^n m with m between sqrt(1/2) and sqrt(2); with t = (m - 1) / (m + 1) then
// log(y) = n log(2) + 2 (t + t^3 / 3 + t^5 / 5 + ...). The result is within 3 epsilons of
// max(1, |log(y)|).
template <typename T>
IPO_HOST_DEVICE T logarithm(T y) {
  using E = Element<T>;
  using C = LogarithmConstants<E>;
  using Int = typename Lanes<T>::Int;
  using Unsigned = typename Lanes<T>::Unsigned;

  const Unsigned past_root =
      bit_cast<Unsigned>(y) - bit_cast<Unsigned>(splat<T>(E(0.70710678118654752)));
  const Unsigned n = bit_cast<Unsigned>(bit_cast<Int>(past_root) >> C::kMantissaBits);
  const T m = bit_cast<T>(bit_cast<Unsigned>(y) - (n << C::kMantissaBits));
  const T exponent = bit_cast<T>(n + bit_cast<Unsigned>(splat<T>(C::kMagic))) - C::kMagic;
  const T t = (m - E(1)) / (m + E(1));
  const T t_squared = t * t;
  T series = splat<T>(E(1) / E(2 * C::kTerms - 1));
  for (int term = C::kTerms - 2; term >= 0; --term) {
    series = series * t_squared + E(1) / E(2 * term + 1);
  }
  return exponent * E(0.69314718055994530942) + E(2) * t * series;
}

}  // namespace ipo_ext::math
