// A row of logits that a block keeps on chip between the passes, in registers and shared memory: it
// is read once wherever there is room.
#pragma once

#include <limits>

#include "kernels/cuda/logits/thread_sums.cuh"

namespace ipo_ext::cuda {

// A block's slice of a row between the passes: a thread's first vectors are in registers, further
// ones in shared memory, and where that ends each pass reads the rest again. Without a softcap,
// what is kept turns from logits into their exponentials. A softcap needs the logit again, and
// registers for its own arithmetic: such a row is kept in shared memory alone.
template <typename Stored, int kThreads, bool kCapped>
class ResidentRow {
 public:
  using Slice = RowSlice<Stored, kThreads>;
  using Storage = RowStorage<Stored, kThreads>;
  using E = typename Slice::E;
  using Terms = LogitTerms<Stored, kCapped>;
  static constexpr int kColumns = Slice::kColumns;
  static constexpr int kInRegisters = kCapped ? 0 : kRegisterVectors<Stored>;

  __device__ __forceinline__ ResidentRow(const RowKernelArgs& rows, Slice& slice, Storage& storage)
      : slice_(slice), storage_(storage), plan_(rows.plan) {}

  __device__ __forceinline__ E logit(int64_t column) const {
    return convert<E>(slice_.row[column]);
  }

  // Reads the slice and returns the thread's largest logit. What is kept comes from memory here
  // alone. NaNs are passed over: they show in the sums.
  __device__ __forceinline__ E load() {
    E row_max = -std::numeric_limits<E>::infinity();
    if (has_extra()) {
      extra() = slice_.load_extra();
      row_max = Max()(extra(), row_max);
    }
    const auto raise = [&](const E(&values)[kColumns]) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) row_max = Max()(values[i], row_max);
    };
    for (int vector = kInRegisters; vector < vectors(); vector += kBatch) {
      load_batch<kBatch>(vector, vectors(), [&](int vector, const E(&values)[kColumns]) {
        raise(values);
        if (vector < kept()) put(vector, values);
      });
    }
    if constexpr (kInRegisters > 0) {
      uint4 words[kInRegisters];
#pragma unroll
      for (int i = 0; i < kInRegisters; ++i) words[i] = slice_.load(i);
#pragma unroll
      for (int i = 0; i < kInRegisters; ++i) {
        Slice::widen(words[i], registers_[i]);
        raise(registers_[i]);
      }
    }
    return row_max;
  }

  // Returns the thread's sums, and makes exponentials of what is kept where there is no softcap.
  __device__ __forceinline__ RowSums exponentiate(const LogitScale<E>& scale, E row_max) {
    ThreadSums<Stored, kCapped> sums(scale, row_max);
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i)
      if (slice_.has_vector(i)) sums.add(registers_[i]);
    for (int vector = kInRegisters; vector < kept() && slice_.has_vector(vector); ++vector) {
      E values[kColumns];
      get(vector, values);
      sums.add(values);
      if (!kCapped) put(vector, values);
    }
    for (int vector = first_unkept(); vector < vectors() && slice_.has_vector(vector); ++vector)
      load_batch<1>(vector, vectors(), [&](int, E(&values)[kColumns]) { sums.add(values); });
    if (has_extra()) sums.add_one(extra());
    return sums.total();
  }

  // Writes the slice's gradient, which may go over the logits. A gradient that is narrower than
  // they are meets columns of other threads, always lower ones: what is read again is read by all
  // before anybody stores.
  template <typename Gradient>
  __device__ __forceinline__ void write_gradient(const GradientTerms<E>& terms,
                                                 Gradient* gradient) {
    const bool aligned = slice_.is_aligned(gradient);
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i) {
      finish(registers_[i], terms);
      slice_.store(gradient, aligned, i, registers_[i]);
    }
    for (int vector = kInRegisters; vector < kept(); ++vector) {
      E values[kColumns];
      get(vector, values);
      finish(values, terms);
      slice_.store(gradient, aligned, vector, values);
    }
    for (int vector = first_unkept(); vector < vectors(); ++vector) {
      load_batch<1>(vector, vectors(), [&](int vector, E(&values)[kColumns]) {
        if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
#pragma unroll
        for (E& value : values) value = terms.template other<kCapped>(value);
        slice_.store(gradient, aligned, vector, values);
      });
    }
    if (has_extra()) {
      E values[] = {extra()};
      finish(values, terms);
      slice_.store_extra(gradient, values[0]);
    }
  }

  // The first warp may call these two: between them its registers, those of the slice included, are
  // free for other work, without which the compiler would spill those of all warps.
  __device__ __forceinline__ void spill_to_shared() const {
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i)
      put<kWarpSize>(storage_.spilled_vectors + threadIdx.x, i, registers_[i]);
    storage_.spilled_slice[threadIdx.x] = slice_;
  }
  __device__ __forceinline__ void restore_from_shared() {
#pragma unroll
    for (int i = 0; i < kInRegisters; ++i)
      get<kWarpSize>(storage_.spilled_vectors + threadIdx.x, i, registers_[i]);
    slice_ = storage_.spilled_slice[threadIdx.x];
  }

 private:
  __device__ __forceinline__ int vectors() const { return plan_.vectors; }
  // Returns how many of them are in registers and shared memory.
  __device__ __forceinline__ int kept() const {
    return min(kInRegisters + plan_.shared_vectors, plan_.vectors);
  }

  // Loads of so many vectors are under way at once.
  static constexpr int kBatch = 4;

  // The column outside of whole vectors is kept in shared memory.
  __device__ __forceinline__ bool has_extra() const { return slice_.extra() >= 0; }
  __device__ __forceinline__ E& extra() { return storage_.extras[threadIdx.x]; }

  // Makes the gradient of what is kept.
  template <int kCount>
  static __device__ __forceinline__ void finish(E (&values)[kCount],
                                                const GradientTerms<E>& terms) {
#pragma unroll
    for (E& value : values) {
      if constexpr (kCapped) {
        value = terms.template other<true>(value);
      } else {
        value *= terms.factor;
      }
    }
  }

  __device__ __forceinline__ int first_unkept() const {
    return kept() > kInRegisters ? kept() : kInRegisters;
  }

  // Calls body(vector, values) for the vectors from `first` on that come before `end`.
  template <int kVectors, typename Body>
  __device__ __forceinline__ void load_batch(int first, int end, const Body& body) const {
    uint4 words[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) words[i] = slice_.load(first + i);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i < end) {
        E values[kColumns];
        Slice::widen(words[i], values);
        body(first + i, values);
      }
    }
  }

  // In shared memory the words of all threads lie side by side. Only the thread itself reads its
  // own, so no barrier is needed.
  static constexpr int kWords = kVectorWords<Stored>;

  template <int kWidth>
  static __device__ __forceinline__ void put(uint4* shared, int vector,
                                             const E (&values)[kColumns]) {
    uint4 words[kWords];
    memcpy(words, values, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWords; ++i) shared[(vector * kWords + i) * kWidth] = words[i];
  }
  template <int kWidth>
  static __device__ __forceinline__ void get(const uint4* shared, int vector,
                                             E (&values)[kColumns]) {
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = shared[(vector * kWords + i) * kWidth];
    memcpy(values, words, sizeof(words));
  }
  __device__ __forceinline__ void put(int vector, const E (&values)[kColumns]) {
    put<kThreads>(storage_.vectors() + threadIdx.x, vector - kInRegisters, values);
  }
  __device__ __forceinline__ void get(int vector, E (&values)[kColumns]) const {
    get<kThreads>(storage_.vectors() + threadIdx.x, vector - kInRegisters, values);
  }

  Slice& slice_;
  Storage& storage_;
  const LaunchPlan& plan_;  // read where it is needed: registers are short
  E registers_[kInRegisters > 0 ? kInRegisters : 1][kColumns];
};

}  // namespace ipo_ext::cuda
