// A block's slice of a row of logits: vectors of columns, which start on 16 bytes wherever the row
// does and are loaded and stored at once, and the columns outside of whole vectors, one for a
// thread.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels/cuda/common/vector.cuh"

namespace ipo_ext::cuda {

// The vectors that a thread keeps in registers: up to half of the 64 registers that
// blocks_per_multiprocessor() leaves it.
template <typename Stored>
constexpr int kRegisterVectors = std::is_same_v<Stored, float>     ? 6
                                 : std::is_same_v<Stored, Float16> ? 3
                                                                   : 4;

// Thread t has every kThreads-th vector of the slice, in ascending order. A launch counts as many
// vectors for every thread; of the last ones a thread may have none.
template <typename Stored, int kThreads>
struct RowSlice {
  static constexpr int kColumns = kVectorElements<Stored>;
  static constexpr int kStride = kThreads * kColumns;
  using E = Compute<Stored>;

  const Stored* row;
  int columns;  // of the row
  int first;    // column of the thread's first vector
  int end;      // column behind the slice's last vector

  __device__ __forceinline__ RowSlice(const Stored* row, int columns, int index, int slices)
      : row(row), columns(columns) {
    const int vectors = (columns - head()) / kColumns;
    const int per_slice = (vectors + slices - 1) / slices;
    const int first_vector = min(index * per_slice, vectors);
    first = head() + (first_vector + static_cast<int>(threadIdx.x)) * kColumns;
    end = head() + min(first_vector + per_slice, vectors) * kColumns;
  }

  // Returns the columns before the first whole vector.
  __device__ __forceinline__ int head() const {
    const int phase = reinterpret_cast<uintptr_t>(row) / sizeof(Stored) % kColumns;
    return min((kColumns - phase) % kColumns, columns);
  }
  // Returns the one column outside of whole vectors that the thread has, or -1. The first block has
  // them.
  __device__ __forceinline__ int extra() const {
    const int thread = threadIdx.x;
    const int before = head();
    const int whole = (columns - before) / kColumns * kColumns;
    const int outside = thread < before ? thread : thread + whole;
    const bool in_first_block = first == before + thread * kColumns;
    return in_first_block && outside < columns ? outside : -1;
  }
  __device__ __forceinline__ int column(int vector) const { return first + vector * kStride; }
  __device__ __forceinline__ bool has_vector(int vector) const { return column(vector) < end; }
  // Returns whether the calling thread is the one that has the column.
  __device__ __forceinline__ bool is_mine(int column) const {
    const bool in_vector = column >= first && column < end && (column - first) % kStride < kColumns;
    return in_vector || column == extra();
  }

  static __device__ __forceinline__ uint4 minus_infinities() {
    Stored stored[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      stored[i] = narrow<Stored>(-std::numeric_limits<E>::infinity());
    uint4 word;
    memcpy(&word, stored, sizeof(word));
    return word;
  }

  // load() and widen() read a vector in two halves, so that many loads can be under way before the
  // first one is looked at. Where the thread has no such vector its columns are -inf.
  __device__ __forceinline__ uint4 load(int vector) const {
    uint4 word = minus_infinities();
    if (has_vector(vector)) word = __ldcg(reinterpret_cast<const uint4*>(row + column(vector)));
    return word;
  }
  static __device__ __forceinline__ void widen(uint4 word, E (&values)[kColumns]) {
    Stored stored[kColumns];
    memcpy(stored, &word, sizeof(word));
    widen_all(stored, values);
  }
  __device__ __forceinline__ E load_extra() const {
    if (extra() < 0) return -std::numeric_limits<E>::infinity();
    Stored stored[1];
    load_mutable(row + extra(), stored);
    return convert<E>(stored[0]);
  }

  template <typename Gradient>
  __device__ __forceinline__ void store(Gradient* gradient, bool aligned, int vector,
                                        const E (&values)[kColumns]) const {
    if (!has_vector(vector)) return;
    Gradient* to = gradient + column(vector);
    Gradient narrowed[kColumns];
    narrow_all(values, narrowed);
    if (aligned) {
      store_aligned(to, narrowed);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) to[i] = narrowed[i];
    }
  }
  template <typename Gradient>
  __device__ __forceinline__ void store_extra(Gradient* gradient, E value) const {
    if (extra() >= 0) gradient[extra()] = narrow<Gradient>(value);
  }

  // Returns whether vectors of the gradient start on a multiple of their size where those of the
  // row do.
  template <typename Gradient>
  __device__ __forceinline__ bool is_aligned(const Gradient* gradient) const {
    constexpr int kBytes = sizeof(Gradient) * kColumns;
    return reinterpret_cast<uintptr_t>(gradient + first) % kBytes == 0;
  }

  template <typename Gradient>
  __device__ __forceinline__ void fill(Gradient* gradient, int vectors, E value) const {
    E values[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = value;
    const bool aligned = is_aligned(gradient);
    for (int vector = 0; vector < vectors; ++vector) store(gradient, aligned, vector, values);
    store_extra(gradient, value);
  }
};

}  // namespace ipo_ext::cuda
