// Adds up a thread's logits relative to the row's maximum: exp(x), and exp(x) * x, which the
// entropy needs, where x is the distance from the maximum.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels/cuda/logits/storage.cuh"

namespace ipo_ext::cuda {

// A thread's sums. Each vector is added up before it joins them, which rounds large numbers less
// often. In fp32 and without a softcap they are made of powers of 2: a multiplication less for each
// logit.
template <typename E, bool kCapped>
class ThreadSums {
 public:
  static constexpr bool kBinary = !kCapped && std::is_same_v<E, float>;

  // `row_max` is capped, and finite.
  __device__ __forceinline__ ThreadSums(const LogitScale<E>& scale, E row_max)
      : scale_(scale),
        row_max_(row_max),
        x_scale_(kBinary ? binary_scale(scale.inverse_temperature) : scale.inverse_temperature) {}

  __device__ __forceinline__ RowTerm<E> term(E logit) const {
    if constexpr (kBinary) {
      return binary_row_term(logit, row_max_, x_scale_);
    } else {
      return row_term(cap<kCapped>(logit, scale_).value, row_max_, x_scale_);
    }
  }

  // Turns logits into their exponentials, but leaves them as they are under a softcap.
  template <int kCount>
  __device__ __forceinline__ void add(E (&logits)[kCount]) {
    E vector_sum_exp = 0, vector_sum_exp_x = 0;
#pragma unroll
    for (E& logit : logits) {
      const RowTerm<E> of_logit = term(logit);
      vector_sum_exp += of_logit.exp;
      vector_sum_exp_x += exp_x(of_logit);
      if (!kCapped) logit = of_logit.exp;
    }
    sum_exp_ += vector_sum_exp;
    sum_exp_x_ += vector_sum_exp_x;
  }

  __device__ __forceinline__ void add_one(E& logit) {
    E logits[] = {logit};
    add(logits);
    logit = logits[0];
  }

  __device__ __forceinline__ RowSums total() const {
    constexpr double kUnit = kBinary ? 1 / ExponentialConstants<double>::kLog2E : 1;
    return {sum_exp_, sum_exp_x_ * kUnit};
  }

 private:
  LogitScale<E> scale_;
  E row_max_;
  E x_scale_;  // makes x of a difference to the maximum
  E sum_exp_ = 0;
  E sum_exp_x_ = 0;
};

}  // namespace ipo_ext::cuda
