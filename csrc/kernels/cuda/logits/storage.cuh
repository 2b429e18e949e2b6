// The shared memory of a block that works on a row of logits: where the blocks exchange the row's
// maximum and sums, what all threads need to write its gradient, and what is kept of the row
// itself.
#pragma once

#include "kernels/cuda/common/cluster.cuh"
#include "kernels/cuda/logits/plan.h"
#include "kernels/cuda/logits/slice.cuh"
#include "kernels/cuda/logits/terms.cuh"
#include "kernels/logits.h"

namespace ipo_ext::cuda {

using namespace ipo_ext::math;

// What the kernels are given.
struct RowKernelArgs {
  LogitsArgs logits;
  LaunchPlan plan;
};

// Returns the larger of two numbers; a NaN loses.
struct Max {
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

constexpr int kMostVectorElements = kVectorElements<BFloat16>;

// What every thread must know to write its columns of a row's gradient.
template <typename E>
struct GradientTerms {
  LogitScale<E> scale;
  E row_max;
  RowDerivative<E> derivative;
  E factor;  // makes it of an exponential that LogitTerms has made, where nothing is capped
  E label;   // the derivative by the label's logit

  // Returns the derivative by a logit that is not the label.
  template <bool kCapped>
  __device__ __forceinline__ E other(E logit) const {
    const CappedLogit<E> capped = cap<kCapped>(logit, scale);
    const RowTerm<E> term = row_term(capped.value, row_max, scale.inverse_temperature);
    return derivative.other(term, capped.derivative);
  }
};

template <typename Terms, bool kCapped, typename E>
__device__ __forceinline__ GradientTerms<E> gradient_terms(const RowDerivative<E>& derivative,
                                                           const LogitScale<E>& scale, E row_max,
                                                           E label_logit) {
  const CappedLogit<E> label = cap<kCapped>(label_logit, scale);
  const RowTerm<E> term = row_term(label.value, row_max, scale.inverse_temperature);
  const Terms terms(scale, finite_or_zero(row_max));
  return {scale, row_max, derivative, derivative.factor() * terms.unit(),
          derivative.label(term, label.derivative)};
}

// The words of 16 bytes in which a thread's vector is kept, in the compute dtype.
template <typename Stored>
constexpr int kVectorWords = kVectorElements<Stored> * sizeof(Compute<Stored>) / sizeof(uint4);

template <typename Stored, int kThreads,
          int kSpilled = kRegisterVectors<Stored> * kVectorWords<Stored>>
struct RowStorage {
  using E = Compute<Stored>;
  ClusterReduceStorage<E, kThreads> row_max;
  ClusterReduceStorage<RowSums, kThreads> sums;
  uint4 spilled_vectors[kSpilled * kWarpSize];
  RowSlice<Stored, kThreads> spilled_slice[kWarpSize];
  E extras[2 * kMostVectorElements];
  LogitScale<E> scale;
  E label_logit;
  int label;
  RowStats<E> stats;  // they and the result wait here while the loss is computed
  RowResult<E> result;
  RowGrads<E> grads;
  GradientTerms<E> terms;
  void* gradient;  // of the row, or null

  // Initialises the barriers: by all threads, before this block may be sent anything.
  __device__ __forceinline__ void init() {
    if (threadIdx.x != 0) return;
    row_max.barrier.init();
    sums.barrier.init();
  }

  // Returns where the vectors lie that the block keeps in shared memory: behind this struct.
  template <int kBytes = kStorageBytes>
  __device__ __forceinline__ uint4* vectors() {
    static_assert(sizeof(RowStorage) <= kBytes && kBytes % sizeof(uint4) == 0, "must hold it");
    return reinterpret_cast<uint4*>(this) + kBytes / sizeof(uint4);
  }
};

}  // namespace ipo_ext::cuda
