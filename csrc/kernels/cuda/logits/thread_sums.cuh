// Adds up a thread's logits relative to the row's maximum: exp(x), and exp(x) * x, which the
// entropy needs, where x is the distance from the maximum.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels/cuda/logits/storage.cuh"

namespace ipo_ext::cuda {

// A thread's sums. Each vector is added up before it joins them, which rounds large numbers less
// often. Where LogitTerms says so, x counts from an offset beside the maximum, and the sums of the
// whole row are taken from there by relative_to_max().
template <typename Stored, bool kCapped, bool kMayFuse = false>
class ThreadSums {
 public:
  using E = Compute<Stored>;

  __device__ __forceinline__ ThreadSums(const LogitScale<E>& scale, E row_max)
      : terms_(scale, row_max) {}

  // Turns logits, which LogitTerms has bounded or not, into their exponentials, but leaves them as
  // they are under a softcap.
  template <bool kBounded = false, int kCount>
  __device__ __forceinline__ void add(E (&logits)[kCount]) {
    E vector_sum_exp = 0, vector_sum_exp_x = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const RowTerm<E> term = kBounded ? terms_.of_bounded(logits[i]) : terms_.of(logits[i]);
      // The compiler may not leave out that 0 is added to the first.
      vector_sum_exp = i == 0 ? term.exp : vector_sum_exp + term.exp;
      vector_sum_exp_x = i == 0 ? exp_x(term) : vector_sum_exp_x + exp_x(term);
      if (!kCapped) logits[i] = term.exp;
    }
    sum_exp_ += vector_sum_exp;
    sum_exp_x_ += vector_sum_exp_x;
  }

  __device__ __forceinline__ void add_one(E& logit) {
    E logits[] = {logit};
    add(logits);
    logit = logits[0];
  }

  __device__ __forceinline__ const LogitTerms<Stored, kCapped, kMayFuse>& terms() const {
    return terms_;
  }

  __device__ __forceinline__ RowSums total() const {
    return {sum_exp_, terms_.has_distances() ? sum_exp_x_ * terms_.kUnit : 0};
  }

 private:
  LogitTerms<Stored, kCapped, kMayFuse> terms_;
  E sum_exp_ = 0;
  E sum_exp_x_ = 0;
};

}  // namespace ipo_ext::cuda
