// What the blocks that share a row of logits tell each other and keep of it in shared memory: its
// maximum, its sums, and the plan by which all threads write its gradient.
#pragma once

#include "kernels/cuda/common/cluster.cuh"
#include "kernels/cuda/logits/plan.h"
#include "kernels/cuda/logits/slice.cuh"
#include "kernels/logits.h"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// What the kernels are given.
struct RowsArgs {
  LogitsArgs logits;
  LaunchPlan plan;
};

// A NaN loses.
struct Larger {
  template <typename E>
  __device__ __forceinline__ E operator()(E a, E b) const {
    return max(a, b);
  }
};

struct MergeRowSums {
  __device__ __forceinline__ RowSums operator()(const RowSums& a, const RowSums& b) const {
    return merge(a, b);
  }
};

// cap_logit where the kernel knows at compile time that there is no softcap.
template <bool kCapped, typename E>
__device__ __forceinline__ CappedLogit<E> cap(E logit, const LogitScale<E>& scale) {
  return cap_logit(logit, kCapped ? scale.softcap : E(0));
}

constexpr int kMostGroupColumns = kGroupColumns<BFloat16>;

// What every thread must know to write its part of a row's gradient.
template <typename E>
struct RowPlan {
  LogitScale<E> scale;
  E largest;
  RowDerivative<E> derivative;
  E factor;  // derivative.factor()
  E label;   // the derivative by the label's logit

  // By a logit that is not the label.
  template <bool kCapped>
  __device__ __forceinline__ E other(E logit) const {
    const CappedLogit<E> capped = cap<kCapped>(logit, scale);
    const RowTerm<E> term = row_term(capped.value, largest, scale.inverse_temperature);
    return derivative.other(term, capped.slope);
  }
};

template <bool kCapped, typename E>
__device__ __forceinline__ RowPlan<E> plan_of(const RowDerivative<E>& derivative,
                                              const LogitScale<E>& scale, E largest,
                                              E label_logit) {
  const CappedLogit<E> label = cap<kCapped>(label_logit, scale);
  const RowTerm<E> term = row_term(label.value, largest, scale.inverse_temperature);
  return {scale, largest, derivative, derivative.factor(), derivative.label(term, label.slope)};
}

// The maximum and the sums of a part of a row, and the label's logit, which must be read before any
// gradient is written.
template <typename E>
struct RowPart {
  E largest;
  E label_logit;
  RowSums sums;
};

// Of 16 bytes each: a step of a thread, as it is held.
template <typename Stored>
constexpr int kHeldWords = kGroupColumns<Stored> * sizeof(Compute<Stored>) / sizeof(uint4);

template <typename Stored, int kThreads, int kAside = kHeldGroups<Stored> * kHeldWords<Stored>>
struct RowStorage {
  using E = Compute<Stored>;
  ClusterReduceStorage<E, kThreads> largest;
  ClusterReduceStorage<RowSums, kThreads> sums;
  uint4 steps_aside[kAside * kWarpSize];
  RowShare<Stored, kThreads> share_aside[kWarpSize];
  E extras[2 * kMostGroupColumns];
  LogitScale<E> scale;
  E label_logit;
  int label;
  RowPart<E> row;  // it and its result wait here while the loss is computed
  RowResult<E> result;
  RowSlopes<E> slopes;
  RowPlan<E> plan;
  void* gradient;  // of the row, or null

  // By all threads, before this block may be sent anything.
  __device__ __forceinline__ void prepare() {
    if (threadIdx.x != 0) return;
    largest.arrivals.prepare();
    sums.arrivals.prepare();
  }

  // Behind it lies what the block holds of its row.
  template <int kBytes = kStorageBytes>
  __device__ __forceinline__ uint4* held() {
    static_assert(sizeof(RowStorage) <= kBytes && kBytes % sizeof(uint4) == 0, "must hold it");
    return reinterpret_cast<uint4*>(this) + kBytes / sizeof(uint4);
  }
};

}  // namespace ipo_ext::cuda
