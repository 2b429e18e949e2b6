// A thread's sums over its logits, relative to the row's maximum: of exponentials, and of them
// times their distance from it, which the entropy needs.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels/cuda/logits/storage.cuh"

namespace ipo_ext::cuda {

// Exponentials are relative to the maximum; nothing but -inf has none, and any number will do.
template <typename E>
__device__ __forceinline__ E finite_or_zero(E largest) {
  return largest == -std::numeric_limits<E>::infinity() ? E(0) : largest;
}

// A thread's sums. Each group is added up before it joins them: fewer roundings of large numbers.
// Without a softcap, in fp32, in powers of 2: a multiplication less for each logit.
template <typename E, bool kCapped>
class ThreadSums {
 public:
  static constexpr bool kBinary = !kCapped && std::is_same_v<E, float>;

  // `largest` of the row: capped, finite.
  __device__ __forceinline__ ThreadSums(const LogitScale<E>& scale, E largest)
      : scale_(scale),
        largest_(largest),
        distance_scale_(kBinary ? binary_scale(scale.inverse_temperature)
                                : scale.inverse_temperature) {}

  __device__ __forceinline__ RowTerm<E> term(E logit) const {
    if constexpr (kBinary) {
      return binary_row_term(logit, largest_, distance_scale_);
    } else {
      return row_term(cap<kCapped>(logit, scale_).value, largest_, distance_scale_);
    }
  }

  // Turns logits into their exponentials, but leaves them as they are under a softcap.
  template <int kCount>
  __device__ __forceinline__ void add(E (&logits)[kCount]) {
    E group_exponentials = 0, group_weighted = 0;
#pragma unroll
    for (E& logit : logits) {
      const RowTerm<E> of_logit = term(logit);
      group_exponentials += of_logit.exponential;
      group_weighted += weighted(of_logit);
      if (!kCapped) logit = of_logit.exponential;
    }
    exponentials_ += group_exponentials;
    weighted_ += group_weighted;
  }

  __device__ __forceinline__ void add_one(E& logit) {
    E logits[] = {logit};
    add(logits);
    logit = logits[0];
  }

  __device__ __forceinline__ RowSums total() const {
    constexpr double kUnit = kBinary ? 1 / ExponentialConstants<double>::kLog2E : 1;
    return {exponentials_, weighted_ * kUnit};
  }

 private:
  LogitScale<E> scale_;
  E largest_;
  E distance_scale_;  // from the difference to the largest
  E exponentials_ = 0;
  E weighted_ = 0;
};

}  // namespace ipo_ext::cuda
