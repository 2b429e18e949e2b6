// A row of logits that a block keeps in registers alone, while the cluster's next one is on its way
// to shared memory: persistent blocks, software pipelined.
#pragma once

#include <limits>

#include "kernels/cuda/common/async.cuh"
#include "kernels/cuda/logits/thread_sums.cuh"

namespace ipo_ext::cuda {

// A block's slice of a row in registers, whose threads have meanwhile started to copy the slice of
// the cluster's next row to shared memory: while a row waits for barriers and is written, the next
// one arrives. Stored words are kept; where they are as wide as exponentials they turn into them,
// else those are computed again for the gradient.
template <typename Stored>
class PipelinedRow {
 public:
  static constexpr int kVectors = kPipelinedVectors;
  using Slice = RowSlice<Stored, kPipelinedThreads>;
  using Storage = RowStorage<Stored, kPipelinedThreads, kVectors>;
  using E = typename Slice::E;
  using Terms = LogitTerms<Stored, false, true>;
  static constexpr int kColumns = Slice::kColumns;
  static constexpr bool kKeepsExponentials = sizeof(Stored) == sizeof(E);

  __device__ __forceinline__ PipelinedRow(Slice& slice, Storage& storage)
      : slice_(slice), storage_(storage) {}

  // Starts to copy a slice. Only the thread itself reads what it copies, so no barrier is needed.
  static __device__ __forceinline__ void prefetch(const Slice& slice, Storage& storage) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (slice.has_vector(i)) cp_async(staged(storage, i), slice.row + slice.column(i));
  }

  __device__ __forceinline__ E logit(int64_t column) const {
    return convert<E>(slice_.row[column]);
  }

  // Takes the slice from shared memory, which is then free for the next row.
  __device__ __forceinline__ void receive() {
    cp_async_wait_all();
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      words_[i] = slice_.has_vector(i) ? *staged(storage_, i) : Slice::minus_infinities();
    extra_ = slice_.extra();
    if (has_extra()) extra() = slice_.load_extra();
  }

  // Returns the thread's largest logit. NaNs are passed over: they show in the sums.
  __device__ __forceinline__ E load() const {
    uint4 word = words_[0];
#pragma unroll
    for (int i = 1; i < kVectors; ++i) word = max_of_each<Stored>(word, words_[i]);
    E values[kColumns];
    Slice::widen(word, values);
    E row_max = has_extra() ? extra() : -std::numeric_limits<E>::infinity();
#pragma unroll
    for (E value : values) row_max = Max()(value, row_max);
    return row_max;
  }

  // Returns the thread's sums.
  __device__ __forceinline__ RowSums exponentiate(const LogitScale<E>& scale, E row_max) {
    ThreadSums<Stored, false, true> sums(scale, row_max);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!slice_.has_vector(i)) continue;
      hide_from_compiler(words_[i]);
      E values[kColumns];
      Slice::widen(sums.terms().bounded(words_[i]), values);
      sums.template add<Terms::kCanBound>(values);
      if constexpr (kKeepsExponentials) memcpy(&words_[i], values, sizeof(uint4));
    }
    if (has_extra()) sums.add_one(extra());
    return sums.total();
  }

  // Writes the slice's gradient, which may go over the logits: all of the row is in registers.
  template <typename Gradient>
  __device__ __forceinline__ void write_gradient(const GradientTerms<E>& terms,
                                                 Gradient* gradient) {
    const bool aligned = slice_.is_aligned(gradient);
    const Terms exponentials(terms.scale, finite_or_zero(terms.row_max));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!slice_.has_vector(i)) continue;
      hide_from_compiler(words_[i]);
      E values[kColumns];
      Slice::widen(words_[i], values);
#pragma unroll
      for (E& value : values) {
        if constexpr (!kKeepsExponentials) value = exponentials.of_bounded(value).exp;
        value *= terms.factor;
      }
      slice_.store(gradient, aligned, i, values);
    }
    if (has_extra()) gradient[extra_] = narrow<Gradient>(extra() * terms.factor);
  }

  // Between these two calls the first warp's registers are free, as ResidentRow's are.
  __device__ __forceinline__ void spill_to_shared() const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      storage_.spilled_vectors[i * kWarpSize + threadIdx.x] = words_[i];
    storage_.spilled_slice[threadIdx.x] = slice_;
  }
  __device__ __forceinline__ void restore_from_shared() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      words_[i] = storage_.spilled_vectors[i * kWarpSize + threadIdx.x];
    slice_ = storage_.spilled_slice[threadIdx.x];
  }

 private:
  static __device__ __forceinline__ uint4* staged(Storage& storage, int vector) {
    return storage.template vectors<kPipelinedStorageBytes>() + vector * kPipelinedThreads +
           threadIdx.x;
  }
  __device__ __forceinline__ bool has_extra() const { return extra_ >= 0; }
  __device__ __forceinline__ E& extra() const { return storage_.extras[threadIdx.x]; }

  Slice& slice_;
  Storage& storage_;
  int extra_ = -1;
  uint4 words_[kVectors];
};

}  // namespace ipo_ext::cuda
