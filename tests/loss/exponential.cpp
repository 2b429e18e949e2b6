// Checks math/exponential.h against libm in a wider type, and prints a digest of every result's
// bits: builds for different instruction sets, and scalar and SIMD code, must print the same.
#include "math/exponential.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "math/simd.h"

namespace {

using namespace ipo_ext::math;

int failures = 0;

template <typename... Values>
void fail(const char* format, Values... values) {
  if (++failures <= 10) std::printf(format, values...);
}

template <typename E>
struct Wider;
template <>
struct Wider<float> {
  using Type = double;
};
template <>
struct Wider<double> {
  using Type = long double;
};

template <typename E>
using Bits = typename Lanes<E>::Unsigned;

// Errors in units in the last place of the exact value, subnormals included.
template <typename E>
double ulp_error(E got, typename Wider<E>::Type exact) {
  using W = typename Wider<E>::Type;
  int exponent;
  std::frexp(exact, &exponent);
  using Limits = std::numeric_limits<E>;
  const int last = std::max(exponent, Limits::min_exponent) - Limits::digits;
  return static_cast<double>(std::fabs(static_cast<W>(got) - exact) / std::ldexp(W(1), last));
}

// (e^x - 1 - x), by its series where subtracting would cancel.
template <typename W>
W mismatch(W x) {
  if (std::fabs(x) > W(0.5)) return std::expm1(x) - x;
  W term = x * x / 2, sum = 0;
  for (int n = 3; n < 40; ++n) {
    sum += term;
    term *= x / n;
  }
  return sum;
}

template <typename E>
struct Worst {
  double exp = 0, exp_at = 0, mismatch = 0, mismatch_at = 0;
};

template <typename E>
void check_one(E x, const Exponential<E>& got, Worst<E>& worst) {
  using W = typename Wider<E>::Type;
  const W exact = std::exp(static_cast<W>(std::min(x, kMaxLog<E>)));
  const double error = ulp_error<E>(got.exp, exact);
  if (!(error <= worst.exp)) worst.exp = error, worst.exp_at = x;
  // Squares below the normal range have no full precision to lose.
  const W mismatch_exact = mismatch<W>(x);
  if (x > 80 ||
      mismatch_exact < W(std::numeric_limits<E>::min()) / std::numeric_limits<E>::epsilon())
    return;
  const double relative =
      static_cast<double>(std::fabs(got.exp_minus_1_minus_x - mismatch_exact) / mismatch_exact) /
      std::numeric_limits<E>::epsilon();
  if (!(relative <= worst.mismatch)) worst.mismatch = relative, worst.mismatch_at = x;
}

template <typename E>
uint64_t digest(uint64_t hash, const Exponential<E>& result) {
  for (const E value : {result.exp, result.exp_minus_1_minus_x}) {
    // Any NaN will do: its bits are the machine's.
    const Bits<E> bits = std::isnan(value) ? Bits<E>(1) : bit_cast<Bits<E>>(value);
    hash = (hash ^ bits) * 0x100000001b3u;
  }
  return hash;
}

// A batch through the scalar and the SIMD code; every lane must give the scalar's bits.
template <typename E>
uint64_t run_batch(const std::vector<E>& values, uint64_t hash, Worst<E>& worst) {
  using T = Vector<E>;
  constexpr size_t kLanes = sizeof(T) / sizeof(E);
  for (size_t begin = 0; begin + kLanes <= values.size(); begin += kLanes) {
    T x;
    std::memcpy(&x, &values[begin], sizeof(x));
    const Exponential<T> vector = exponential(x);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const E value = values[begin + lane];
      const Exponential<E> scalar = exponential(value);
      const Exponential<E> of_lane = {vector.exp[lane], vector.exp_minus_1_minus_x[lane]};
      if (digest<E>(0, scalar) != digest<E>(0, of_lane))
        fail("exp(%a): scalar %a, SIMD %a\n", double(value), double(scalar.exp),
             double(of_lane.exp));
      hash = digest<E>(hash, scalar);
      if (std::isfinite(value)) check_one<E>(value, scalar, worst);
    }
  }
  return hash;
}

// Every kStep-th float there is, NaNs and infinities included.
std::vector<float> all_floats(uint32_t step) {
  std::vector<float> values;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += step)
    values.push_back(bit_cast<float>(static_cast<uint32_t>(bits)));
  return values;
}

template <typename E>
std::vector<E> within_reach(size_t count) {
  std::mt19937_64 generator(1);
  std::uniform_real_distribution<double> range(ExponentialConstants<E>::kLowest - 2,
                                               ExponentialConstants<E>::kHighest + 2);
  std::uniform_real_distribution<double> magnitude(-40, 6.5);
  std::vector<E> values;
  for (size_t i = 0; i < count; ++i) {
    values.push_back(static_cast<E>(range(generator)));
    const double value = std::exp2(magnitude(generator));
    values.push_back(static_cast<E>(i % 2 ? value : -value));
  }
  return values;
}

template <typename E>
std::vector<E> extremes() {
  using Limits = std::numeric_limits<E>;
  const E ends[] = {0,
                    1,
                    Limits::min(),
                    Limits::denorm_min(),
                    Limits::max(),
                    Limits::infinity(),
                    kMaxLog<E>,
                    ExponentialConstants<E>::kLowest,
                    E(-103.97208),
                    E(-87.33655),
                    E(-708.396),
                    E(-745.13),
                    E(80)};
  std::vector<E> values(64, Limits::quiet_NaN());
  for (const E end : ends) {
    for (const E value : {end, -end}) {
      values.push_back(value);
      values.push_back(std::nextafter(value, Limits::infinity()));
      values.push_back(std::nextafter(value, -Limits::infinity()));
    }
  }
  while (values.size() % 64 != 0) values.push_back(0);
  return values;
}

template <typename E>
void check_special_values() {
  using Limits = std::numeric_limits<E>;
  const E infinity = Limits::infinity(), nan = Limits::quiet_NaN(), highest = kMaxLog<E>;
  if (!std::isfinite(exponential(highest).exp)) fail("exp(kMaxLog) is not finite\n");
  const auto above = static_cast<typename Wider<E>::Type>(std::nextafter(highest, infinity));
  if (std::isfinite(static_cast<E>(std::exp(above)))) fail("kMaxLog is not the largest\n");
  if (exponential(infinity).exp != exponential(highest).exp) fail("exp(inf) is not clamped\n");
  if (exponential(-infinity).exp != 0) fail("exp(-inf) is not 0\n");
  if (exponential(-Limits::max()).exp != 0) fail("exp(-max) is not 0\n");
  if (!std::isfinite(exponential(-Limits::max()).exp_minus_1_minus_x)) fail("at -max\n");
  if (!std::isnan(exponential(nan).exp)) fail("exp(NaN) is not NaN\n");
  if (exponential(E(0)).exp != 1 || exponential(E(0)).exp_minus_1_minus_x != 0) fail("at 0\n");
  if (exponential(E(-0.0)).exp != 1) fail("at -0\n");
}

// The softmax's exponential, over its whole range: its error in ULP, less 5/4 |x|.
template <typename E>
double worst_of_nonpositive() {
  using T = Vector<E>;
  constexpr int kLanes = sizeof(T) / sizeof(E), kCount = 2'000'000;
  double worst = 0;
  for (int i = 0; i < kCount; ++i) {
    const E x = kVanishing<E> * (static_cast<E>(i) / kCount);
    const E got = exponential_of_nonpositive(x);
    if (got != exponential_of_nonpositive(splat<T>(x))[i % kLanes]) fail("SIMD at %a\n", double(x));
    const auto exact = std::exp(static_cast<typename Wider<E>::Type>(x));
    if (exact < std::numeric_limits<E>::min()) continue;
    worst = std::max(worst, ulp_error<E>(got, exact) + 1.25 * double(x));
  }
  if (exponential_of_nonpositive(E(0)) != 1) fail("softmax: exp(0) is not 1\n");
  if (exponential_of_nonpositive(kVanishing<E>) != 0) fail("softmax: no 0 at the end\n");
  if (!std::isnan(exponential_of_nonpositive(std::numeric_limits<E>::quiet_NaN())))
    fail("softmax: exp(NaN) is not NaN\n");
  return worst;
}

template <typename E>
void check(const char* name, const std::vector<std::vector<E>>& batches) {
  Worst<E> worst;
  uint64_t hash = 0xcbf29ce484222325u;
  for (const auto& batch : batches) hash = run_batch(batch, hash, worst);
  check_special_values<E>();
  // The mismatch is worst just past ln(2) / 2, where n turns 1 and its terms of about 1 leave 0.07.
  constexpr double kExpUlp = 1, kMismatchEpsilons = 12;
  if (!(worst.exp <= kExpUlp)) fail("exp: %g ULP at %a\n", worst.exp, worst.exp_at);
  if (!(worst.mismatch <= kMismatchEpsilons))
    fail("exp(x) - 1 - x: %g eps at %a\n", worst.mismatch, worst.mismatch_at);
  const double worst_softmax = worst_of_nonpositive<E>();
  if (!(worst_softmax <= 2)) fail("softmax: %g ULP beyond 5/4 |x|\n", worst_softmax);
  std::printf("%s digest %016llx exp %.3f ULP, exp - 1 - x %.3f eps\n", name,
              static_cast<unsigned long long>(hash), worst.exp, worst.mismatch);
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t step = argc > 1 ? std::atoi(argv[1]) : 997;
  check<float>("float", {all_floats(step), within_reach<float>(1'000'000), extremes<float>()});
  check<double>("double", {within_reach<double>(1'000'000), extremes<double>()});
  return failures != 0;
}
