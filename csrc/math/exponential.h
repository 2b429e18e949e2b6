// Computes exp(x) within 1 ULP and exp(x) - 1 - x without cancellation from one polynomial: no
// branch, no table and no libm call, so that it runs in every SIMD lane and on the device alike.
// The softmax, whose arguments are never positive, has a cheaper exp of its own.
#pragma once

#include <type_traits>

#include "math/lanes.h"

namespace ipo_ext::math {

template <typename E>
struct ExponentialConstants;

template <>
struct ExponentialConstants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kBias = 127;
  static constexpr float kLog2E = 1.44269504088896340736f;
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;    // few bits, so that n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -104.0f;              // exp is 0 below
  static constexpr float kHighest = 88.72283172607422f;  // exp is infinite above
  static constexpr float kVanishing = -88.02969f;        // -127 ln(2)

  // (exp(f) - 1 - f) / f^2 for |f| <= ln(2) / 2: Cephes' minimax polynomial.
  template <typename T>
  static IPO_HOST_DEVICE T tail(T f) {
    T q = multiply_add(1.9875691500e-4f, f, 1.3981999507e-3f);
    q = multiply_add(q, f, 8.3334519073e-3f);
    q = multiply_add(q, f, 4.1665795894e-2f);
    q = multiply_add(q, f, 1.6666665459e-1f);
    return multiply_add(q, f, 5.0000001201e-1f);
  }

  // 2^f for |f| <= 1/2 within 9.2e-8, relative: the minimax polynomial whose constant is 1.
  template <typename T>
  static IPO_HOST_DEVICE T power_of_2(T f) {
    T q = 1.3264727e-3f * f + 9.6715128e-3f;
    q = q * f + 5.5507337e-2f;
    q = q * f + 2.4022242e-1f;
    q = q * f + 6.9314698e-1f;
    return q * f + 1.0f;
  }
};

template <>
struct ExponentialConstants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kBias = 1023;
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -746.0;
  static constexpr double kHighest = 709.782712893384;
  static constexpr double kVanishing = -709.0895657128241;  // -1023 ln(2)

  // The Taylor series of the function above; its first term that is left out is below 2^-57.
  template <typename T>
  static IPO_HOST_DEVICE T tail(T f) {
    T q = multiply_add(1.0 / 6227020800.0, f, 1.0 / 479001600.0);
    q = multiply_add(q, f, 1.0 / 39916800.0);
    q = multiply_add(q, f, 1.0 / 3628800.0);
    q = multiply_add(q, f, 1.0 / 362880.0);
    q = multiply_add(q, f, 1.0 / 40320.0);
    q = multiply_add(q, f, 1.0 / 5040.0);
    q = multiply_add(q, f, 1.0 / 720.0);
    q = multiply_add(q, f, 1.0 / 120.0);
    q = multiply_add(q, f, 1.0 / 24.0);
    q = multiply_add(q, f, 1.0 / 6.0);
    return multiply_add(q, f, 0.5);
  }
  template <typename T>
  static IPO_HOST_DEVICE T power_of_2(T f) {
    const T g = f * 0.693147180559945309417;
    return (g + g * g * tail(g)) + 1.0;
  }
};

// The largest x whose exp(x) is finite.
template <typename E>
constexpr E kMaxLog = ExponentialConstants<E>::kHighest;

// Beyond this log-ratio a measure of it says "broken", not how much; sums of its exponential still
// fit fp32.
constexpr double kMeasureClamp = 80;
constexpr double kExpAtMeasureClamp = 5.54062238439351e34;  // the same double as exp(80) - 1 - 80

// Log-ratios up to this size are tame: their exponential needs no care, and no measure clamps them.
constexpr double kTame = 64;

template <typename T>
struct Exponential {
  T exp;                  // exp(x), x clamped to kMaxLog; NaN for NaN
  T exp_minus_1_minus_x;  // finite for -max <= x <= kMeasureClamp; within 12 epsilons, relative
};

// x = n ln(2) + f, with |f| <= ln(2) / 2.
template <typename T>
struct SplitArgument {
  T rounded;  // holds n in its last bits
  T f;
  T tail;  // exp(f) - 1 - f
};

template <typename T>
IPO_HOST_DEVICE SplitArgument<T> split_argument(T x) {
  using C = ExponentialConstants<Element<T>>;
  const T rounded = multiply_add(C::kLog2E, x, C::kRoundMagic);
  const T n = rounded - C::kRoundMagic;
  const T f = multiply_add(-C::kLn2Low, n, multiply_add(-C::kLn2High, n, x));
  return {rounded, f, rounded_product(f * f, C::tail(f))};
}

// For n = 0 the last bracket is exactly 0: near x = 0 the tail's full relative accuracy remains.
template <typename T>
IPO_HOST_DEVICE T exp_minus_1_minus_x(const SplitArgument<T>& split, T scale, T x) {
  using E = Element<T>;
  return multiply_add(scale, split.tail, multiply_add(scale, split.f, -x) + (scale - E(1)));
}

// Computes exp(x) = 2^n (1 + f + f^2 tail(f)).
template <typename T>
IPO_HOST_DEVICE Exponential<T> exponential(T x) {
  using E = Element<T>;
  using C = ExponentialConstants<E>;
  using Int = typename Lanes<T>::Int;
  using Unsigned = typename Lanes<T>::Unsigned;

  const T bounded = smaller(splat<T>(C::kHighest), larger(splat<T>(C::kLowest), x));  // keeps NaN
  const SplitArgument<T> split = split_argument(bounded);

  // 2^n is taken as two factors: n alone can leave the exponent's range where exp(x) does not. The
  // integers are unsigned, because a NaN's n is anything.
  const Unsigned exponent =
      bit_cast<Unsigned>(split.rounded) - bit_cast<Unsigned>(splat<T>(C::kRoundMagic));
  const Unsigned half = bit_cast<Unsigned>(bit_cast<Int>(exponent) >> 1);
  const T scale_a = bit_cast<T>((half + C::kBias) << C::kMantissaBits);
  const T scale_b = bit_cast<T>((exponent - half + C::kBias) << C::kMantissaBits);
  return {((split.f + split.tail) + E(1)) * scale_a * scale_b,
          exp_minus_1_minus_x(split, scale_a * scale_b, x)};
}

// Computes the same bits for |x| <= kTame, with one factor and no bound.
template <typename T>
IPO_HOST_DEVICE Exponential<T> exponential_of_tame(T x) {
  using C = ExponentialConstants<Element<T>>;
  using Unsigned = typename Lanes<T>::Unsigned;
  const SplitArgument<T> split = split_argument(x);
  // The shift leaves nothing of the magic number but zeros.
  const T scale = bit_cast<T>((bit_cast<Unsigned>(split.rounded) << C::kMantissaBits) +
                              (C::kBias << C::kMantissaBits));
  return {multiply_add(split.f + split.tail, scale, scale), exp_minus_1_minus_x(split, scale, x)};
}

// From this argument down exponential_of_nonpositive is exactly 0, and so are the softmax's terms.
template <typename E>
constexpr E kVanishing = ExponentialConstants<E>::kVanishing;

#if defined(__CUDA_ARCH__)
// Computes 2^x by the device's special function unit: within 2 ULP, subnormal results are 0.
__device__ __forceinline__ float device_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// Computes 2^x for x from -127 (in fp64 -1023), where it is exactly 0, to what rounding leaves
// above 0; NaN for NaN. The factor 2^n needs no shift of n, because the sum that rounds to n holds
// its biased exponent already. In fp32 the device does it in one instruction, within two ULP, for
// any x <= 0.
template <typename T>
IPO_HOST_DEVICE T power_of_2(T x) {
  using E = Element<T>;
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) return device_exp2(x);
#endif
  using C = ExponentialConstants<E>;
  using Unsigned = typename Lanes<T>::Unsigned;

  constexpr E kMagic = C::kRoundMagic + C::kBias;
  const T rounded = x + kMagic;
  const T f = x - (rounded - kMagic);
  return C::power_of_2(f) * bit_cast<T>(bit_cast<Unsigned>(rounded) << C::kMantissaBits);
}

// power_of_2 for any x that rounding leaves no more than just above 0: 0 below -127, and for -inf.
IPO_HOST_DEVICE float power_of_2_or_zero(float x) {
#if defined(__CUDA_ARCH__)
  return device_exp2(x);
#else
  constexpr float kLowest = -static_cast<float>(ExponentialConstants<float>::kBias);
  return power_of_2(x < kLowest ? kLowest : x);
#endif
}

// Computes exp(x) for x from kVanishing to what rounding leaves above 0; NaN for NaN. It is off by
// 2 + 5/4 |x| ULP, about what rounding x itself has cost.
template <typename T>
IPO_HOST_DEVICE T exponential_of_nonpositive(T x) {
  return power_of_2(x * ExponentialConstants<Element<T>>::kLog2E);
}

}  // namespace ipo_ext::math
