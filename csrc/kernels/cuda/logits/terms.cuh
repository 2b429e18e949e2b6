// Makes the softmax's terms of a row's logits: the exponential of each, relative to the row's
// maximum or, for logits of 16 bits, to an offset beside it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/common/vector.cuh"
#include "math/softmax_row.h"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// Returns cap_logit(), whose work is left out of kernels that are compiled for no softcap.
template <bool kCapped, typename E>
__device__ __forceinline__ CappedLogit<E> cap(E logit, const LogitScale<E>& scale) {
  return cap_logit(logit, kCapped ? scale.softcap : E(0));
}

// Under a softcap and in fp64, terms are powers of e. In fp32 and without a softcap they are powers
// of 2, a multiplication less for each logit; of logits of 16 bits, one fused multiply-add each,
// where rows have registers for it: kMayFuse.
template <typename Stored, bool kCapped, bool kMayFuse = false>
class LogitTerms {
 public:
  using E = Compute<Stored>;
  static constexpr bool kBinary = !kCapped && std::is_same_v<E, float>;
  static constexpr bool kFused = kMayFuse && kBinary && sizeof(Stored) == 2;
  static constexpr int kSignificandBits = std::is_same_v<Stored, Float16> ? 11 : 8;
  static constexpr double kUnit = kBinary ? kLn2 : 1;  // of x

  // `row_max` is capped, and finite.
  __device__ __forceinline__ LogitTerms(const LogitScale<E>& scale, E row_max)
      : scale_(scale), row_max_(row_max) {
    x_scale_ = kBinary ? binary_scale(scale.inverse_temperature) : scale.inverse_temperature;
    if constexpr (kFused) {
      fused_ = fused_scale<kSignificandBits>(row_max, x_scale_);
      lowest_pair_ = fused_.saturated ? kNothing : lowest_pair();
    }
  }

  // Returns a logit's term, whose x is finite even for -inf.
  __device__ __forceinline__ RowTerm<E> of(E logit) const {
    if constexpr (kFused) {
      const RowTerm<E> term = of_bounded(logit);
      return {term.x < kLowest ? kLowest : term.x, term.exp};
    } else if constexpr (kBinary) {
      return binary_row_term(logit, row_max_, x_scale_);
    } else {
      return row_term(cap<kCapped>(logit, scale_).value, row_max_, x_scale_);
    }
  }

  // The same for one of bounded() logits.
  __device__ __forceinline__ RowTerm<E> of_bounded(E logit) const {
    if constexpr (kFused) {
      return fused_row_term(logit, fused_);
    } else {
      return of(logit);
    }
  }

  // Raises bf16 logits that vanish to one that does, two at a time, where exp(x) * x matters: 0
  // times an x of -inf would be NaN. fp16 may have no number that is low enough.
  static constexpr bool kCanBound = kFused && std::is_same_v<Stored, BFloat16>;
  __device__ __forceinline__ uint4 bounded(const uint4& word) const {
    return kCanBound ? max_of_each_or_nan(word, lowest_pair_) : word;
  }

  // Returns whether exp(x) * x may be other than 0.
  __device__ __forceinline__ bool has_distances() const {
    if constexpr (kFused) return !fused_.saturated;
    return true;
  }

  // Returns what exponentials must be multiplied by to be relative to the maximum.
  __device__ __forceinline__ E unit() const {
    if constexpr (kFused) return small_exponential(shift_of(fused_, row_max_));
    return 1;
  }
  __device__ __forceinline__ RowSums relative_to_max(const RowSums& sums) const {
    if constexpr (kFused) return math::relative_to_max(sums, fused_, row_max_);
    return sums;
  }

 private:
  static constexpr E kLowest = -127;
  static constexpr uint32_t kNothing = 0xff80ff80;  // -inf twice

  // Returns, twice, a bf16 number 127 to 1200 below the maximum in powers of 2. Its last bits are
  // cut off, which loses up to a 128th of it, no more than 260 / scale.
  // kHighestTemperature keeps the quotient finite and above 0.
  __device__ __forceinline__ uint32_t lowest_pair() const {
    const uint32_t bits = __float_as_uint(row_max_ - __fdividef(512, fused_.scale));
    return (bits & 0xffff0000u) | bits >> 16;
  }

  LogitScale<E> scale_;
  E row_max_;
  E x_scale_;  // makes x of a difference to the maximum
  FusedScale fused_;
  uint32_t lowest_pair_;
};

}  // namespace ipo_ext::cuda
