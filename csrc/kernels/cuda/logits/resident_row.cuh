// A row of logits as a block holds it between the passes, in registers and shared memory: read once
// wherever there is room.
#pragma once

#include <limits>

#include "kernels/cuda/logits/thread_sums.cuh"

namespace ipo_ext::cuda {

// A block's share of a row between the passes: first steps in registers, further ones in shared
// memory, and where that ends each pass reads the rest again. Without a softcap, what is held turns
// from logits into their exponentials. A softcap needs the logit again, and registers for its own
// arithmetic: such a row is held in shared memory alone.
template <typename Stored, int kThreads, bool kCapped>
class HeldRow {
 public:
  using Share = RowShare<Stored, kThreads>;
  using Storage = RowStorage<Stored, kThreads>;
  using E = typename Share::E;
  static constexpr int kColumns = Share::kColumns;
  static constexpr int kRegisterSteps = kCapped ? 0 : kHeldGroups<Stored>;

  __device__ __forceinline__ HeldRow(const RowsArgs& rows, Share& share, Storage& storage)
      : share_(share), storage_(storage), steps_(rows.plan.vectors) {
    held_ = min(kRegisterSteps + rows.plan.shared_vectors, rows.plan.vectors);
  }

  __device__ __forceinline__ E logit(int64_t column) const {
    return convert<E>(share_.row[column]);
  }

  // The thread's largest logit, on the only way of what is held from memory; NaNs are passed over,
  // they show in the sums.
  __device__ __forceinline__ E load() {
    E largest = -std::numeric_limits<E>::infinity();
    if (has_extra()) {
      extra() = share_.load_extra();
      largest = Larger()(extra(), largest);
    }
    const auto raise = [&](const E(&values)[kColumns]) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) largest = Larger()(values[i], largest);
    };
    for (int step = kRegisterSteps; step < steps_; step += kBatch) {
      load_batch<kBatch>(step, steps_, [&](int step, const E(&values)[kColumns]) {
        raise(values);
        if (step < held_) put(step, values);
      });
    }
    if constexpr (kRegisterSteps > 0) {
      uint4 words[kRegisterSteps];
#pragma unroll
      for (int i = 0; i < kRegisterSteps; ++i) words[i] = share_.load(i);
#pragma unroll
      for (int i = 0; i < kRegisterSteps; ++i) {
        Share::widen(words[i], registers_[i]);
        raise(registers_[i]);
      }
    }
    return largest;
  }

  __device__ __forceinline__ RowSums exponentiate(const LogitScale<E>& scale, E largest) {
    ThreadSums<E, kCapped> sums(scale, largest);
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i)
      if (share_.has_group(i)) sums.add(registers_[i]);
    for (int step = kRegisterSteps; step < held_ && share_.has_group(step); ++step) {
      E values[kColumns];
      get(step, values);
      sums.add(values);
      if (!kCapped) put(step, values);
    }
    for (int step = first_unheld(); step < steps_ && share_.has_group(step); ++step)
      load_batch<1>(step, steps_, [&](int, E(&values)[kColumns]) { sums.add(values); });
    if (has_extra()) sums.add_one(extra());
    return sums.total();
  }

  // May go over the logits. A gradient that is narrower than they are meets columns of other
  // threads, always lower ones: what is read again is read by all before anybody stores.
  template <typename Gradient>
  __device__ __forceinline__ void write_gradient(const RowPlan<E>& plan, Gradient* gradient) {
    const bool aligned = share_.is_aligned(gradient);
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i) {
      finish(registers_[i], plan);
      share_.store(gradient, aligned, i, registers_[i]);
    }
    for (int step = kRegisterSteps; step < held_; ++step) {
      E values[kColumns];
      get(step, values);
      finish(values, plan);
      share_.store(gradient, aligned, step, values);
    }
    for (int step = first_unheld(); step < steps_; ++step) {
      load_batch<1>(step, steps_, [&](int step, E(&values)[kColumns]) {
        if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
#pragma unroll
        for (E& value : values) value = plan.template other<kCapped>(value);
        share_.store(gradient, aligned, step, values);
      });
    }
    if (has_extra()) {
      E values[] = {extra()};
      finish(values, plan);
      share_.store_extra(gradient, values[0]);
    }
  }

  // For the first warp: between the two calls its registers, those of the share included, are free
  // for other work, without which the compiler would spill those of all warps.
  __device__ __forceinline__ void put_aside() const {
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i)
      put<kWarpSize>(storage_.steps_aside + threadIdx.x, i, registers_[i]);
    storage_.share_aside[threadIdx.x] = share_;
  }
  __device__ __forceinline__ void take_back() {
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i)
      get<kWarpSize>(storage_.steps_aside + threadIdx.x, i, registers_[i]);
    share_ = storage_.share_aside[threadIdx.x];
  }

 private:
  // Loads of these many steps are under way at once.
  static constexpr int kBatch = 4;

  // The column outside of whole groups is held as a step in shared memory is.
  __device__ __forceinline__ bool has_extra() const { return share_.extra() >= 0; }
  __device__ __forceinline__ E& extra() { return storage_.extras[threadIdx.x]; }

  // From what is held to the gradient.
  template <int kCount>
  static __device__ __forceinline__ void finish(E (&values)[kCount], const RowPlan<E>& plan) {
#pragma unroll
    for (E& value : values) {
      if constexpr (kCapped) {
        value = plan.template other<true>(value);
      } else {
        value *= plan.factor;
      }
    }
  }

  __device__ __forceinline__ int first_unheld() const {
    return held_ > kRegisterSteps ? held_ : kRegisterSteps;
  }

  // body(step, values) for the steps from `first` on that come before `end`.
  template <int kSteps, typename Body>
  __device__ __forceinline__ void load_batch(int first, int end, const Body& body) const {
    uint4 words[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) words[i] = share_.load(first + i);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (first + i < end) {
        E values[kColumns];
        Share::widen(words[i], values);
        body(first + i, values);
      }
    }
  }

  // A step in shared memory: 16 bytes of each thread side by side. Only the thread itself reads
  // them, so no barrier is needed.
  static constexpr int kWords = kHeldWords<Stored>;

  template <int kWidth>
  static __device__ __forceinline__ void put(uint4* shared, int step, const E (&values)[kColumns]) {
    uint4 words[kWords];
    memcpy(words, values, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWords; ++i) shared[(step * kWords + i) * kWidth] = words[i];
  }
  template <int kWidth>
  static __device__ __forceinline__ void get(const uint4* shared, int step, E (&values)[kColumns]) {
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = shared[(step * kWords + i) * kWidth];
    memcpy(values, words, sizeof(words));
  }
  __device__ __forceinline__ void put(int step, const E (&values)[kColumns]) {
    put<kThreads>(storage_.held() + threadIdx.x, step - kRegisterSteps, values);
  }
  __device__ __forceinline__ void get(int step, E (&values)[kColumns]) const {
    get<kThreads>(storage_.held() + threadIdx.x, step - kRegisterSteps, values);
  }

  Share& share_;
  Storage& storage_;
  int steps_;
  int held_;  // of them in registers and shared memory
  E registers_[kRegisterSteps > 0 ? kRegisterSteps : 1][kColumns];
};

}  // namespace ipo_ext::cuda
