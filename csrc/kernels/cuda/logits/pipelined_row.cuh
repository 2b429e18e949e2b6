// A row of logits in registers alone, while the cluster's next one is on its way to shared memory.
#pragma once

#include <limits>

#include "kernels/cuda/common/async.cuh"
#include "kernels/cuda/logits/thread_sums.cuh"

namespace ipo_ext::cuda {

// A block's share of a row in registers alone, whose threads have meanwhile started to copy the
// share of the cluster's next row to shared memory: while a row waits for barriers and is written,
// the next one arrives. Stored words are kept; where they are as wide as exponentials they turn
// into them, else those are computed again for the gradient.
template <typename Stored>
class RowInTurn {
 public:
  static constexpr int kSteps = kPipelinedVectors;
  using Share = RowShare<Stored, kPipelinedThreads>;
  using Storage = RowStorage<Stored, kPipelinedThreads, kSteps>;
  using E = typename Share::E;
  static constexpr int kColumns = Share::kColumns;
  static constexpr bool kKeepsExponentials = sizeof(Stored) == sizeof(E);

  __device__ __forceinline__ RowInTurn(Share& share, Storage& storage)
      : share_(share), storage_(storage) {}

  // Only the thread itself reads what it copies, so no barrier is needed.
  static __device__ __forceinline__ void fetch(const Share& share, Storage& storage) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (share.has_group(i)) copy_ahead(staged(storage, i), share.row + share.column(i));
  }

  __device__ __forceinline__ E logit(int64_t column) const {
    return convert<E>(share_.row[column]);
  }

  // From shared memory, which is then free for the next row.
  __device__ __forceinline__ void take() {
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      words_[i] = share_.has_group(i) ? *staged(storage_, i) : Share::minus_infinities();
    extra_ = share_.extra();
    if (has_extra()) extra() = share_.load_extra();
  }

  // The thread's largest logit; NaNs are passed over, they show in the sums.
  __device__ __forceinline__ E load() const {
    uint4 word = words_[0];
#pragma unroll
    for (int i = 1; i < kSteps; ++i) word = larger_of_each<Stored>(word, words_[i]);
    E values[kColumns];
    Share::widen(word, values);
    E largest = has_extra() ? extra() : -std::numeric_limits<E>::infinity();
#pragma unroll
    for (E value : values) largest = Larger()(value, largest);
    return largest;
  }

  __device__ __forceinline__ RowSums exponentiate(const LogitScale<E>& scale, E largest) {
    ThreadSums<E, false> sums(scale, largest);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (!share_.has_group(i)) continue;
      forget_uses(words_[i]);
      E values[kColumns];
      Share::widen(words_[i], values);
      sums.add(values);
      if constexpr (kKeepsExponentials) memcpy(&words_[i], values, sizeof(uint4));
    }
    if (has_extra()) sums.add_one(extra());
    return sums.total();
  }

  // May go over the logits: all of the row is in registers.
  template <typename Gradient>
  __device__ __forceinline__ void write_gradient(const RowPlan<E>& plan, Gradient* gradient) {
    const bool aligned = share_.is_aligned(gradient);
    const ThreadSums<E, false> terms(plan.scale, finite_or_zero(plan.largest));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (!share_.has_group(i)) continue;
      forget_uses(words_[i]);
      E values[kColumns];
      Share::widen(words_[i], values);
#pragma unroll
      for (E& value : values) {
        if constexpr (!kKeepsExponentials) value = terms.term(value).exponential;
        value *= plan.factor;
      }
      share_.store(gradient, aligned, i, values);
    }
    if (has_extra()) gradient[extra_] = narrow<Gradient>(extra() * plan.factor);
  }

  // As HeldRow's.
  __device__ __forceinline__ void put_aside() const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) storage_.steps_aside[i * kWarpSize + threadIdx.x] = words_[i];
    storage_.share_aside[threadIdx.x] = share_;
  }
  __device__ __forceinline__ void take_back() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) words_[i] = storage_.steps_aside[i * kWarpSize + threadIdx.x];
    share_ = storage_.share_aside[threadIdx.x];
  }

 private:
  static __device__ __forceinline__ uint4* staged(Storage& storage, int step) {
    return storage.template held<kPipelinedStorageBytes>() + step * kPipelinedThreads + threadIdx.x;
  }
  __device__ __forceinline__ bool has_extra() const { return extra_ >= 0; }
  __device__ __forceinline__ E& extra() const { return storage_.extras[threadIdx.x]; }

  Share& share_;
  Storage& storage_;
  int extra_ = -1;
  uint4 words_[kSteps];
};

}  // namespace ipo_ext::cuda
