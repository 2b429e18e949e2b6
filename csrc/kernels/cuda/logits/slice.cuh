// A block's share of a row of logits: groups of columns that start on 16 bytes wherever the row
// does, loaded and stored at once, and the columns outside of whole groups, one for a thread.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels/cuda/common/vector.cuh"

namespace ipo_ext::cuda {

// Groups that a thread holds in registers: up to half of the 64 that blocks_together() leaves it.
template <typename Stored>
constexpr int kHeldGroups = std::is_same_v<Stored, float>     ? 6
                            : std::is_same_v<Stored, Float16> ? 3
                                                              : 4;

// Of the block's groups, thread t has every kThreads-th: its steps, in ascending order. A launch
// has the same number of steps everywhere; in the last ones a thread may have no group.
template <typename Stored, int kThreads>
struct RowShare {
  static constexpr int kColumns = kGroupColumns<Stored>;
  static constexpr int kStride = kThreads * kColumns;
  using E = Compute<Stored>;

  const Stored* row;
  int columns;  // of the row
  int first;    // column of the thread's first group
  int end;      // of the block's groups

  __device__ __forceinline__ RowShare(const Stored* row, int columns, int part, int parts)
      : row(row), columns(columns) {
    const int groups = (columns - head()) / kColumns;
    const int share = (groups + parts - 1) / parts;
    const int first_group = min(part * share, groups);
    first = head() + (first_group + static_cast<int>(threadIdx.x)) * kColumns;
    end = head() + min(first_group + share, groups) * kColumns;
  }

  // Columns before the first whole group.
  __device__ __forceinline__ int head() const {
    const int phase = reinterpret_cast<uintptr_t>(row) / sizeof(Stored) % kColumns;
    return min((kColumns - phase) % kColumns, columns);
  }
  // The one column outside of whole groups that the thread has, or -1. The first block has them.
  __device__ __forceinline__ int extra() const {
    const int thread = threadIdx.x;
    const int before = head();
    const int whole = (columns - before) / kColumns * kColumns;
    const int outside = thread < before ? thread : thread + whole;
    const bool in_first_block = first == before + thread * kColumns;
    return in_first_block && outside < columns ? outside : -1;
  }
  __device__ __forceinline__ int column(int step) const { return first + step * kStride; }
  __device__ __forceinline__ bool has_group(int step) const { return column(step) < end; }
  // Whether the calling thread is the one that has the column.
  __device__ __forceinline__ bool is_mine(int column) const {
    const bool in_group = column >= first && column < end && (column - first) % kStride < kColumns;
    return in_group || column == extra();
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

  // A group in two halves, so that many loads can be under way before the first one is looked at.
  // -inf where the thread has none.
  __device__ __forceinline__ uint4 load(int step) const {
    uint4 word = minus_infinities();
    if (has_group(step)) word = __ldcg(reinterpret_cast<const uint4*>(row + column(step)));
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
  __device__ __forceinline__ void store(Gradient* gradient, bool aligned, int step,
                                        const E (&values)[kColumns]) const {
    if (!has_group(step)) return;
    Gradient* to = gradient + column(step);
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

  // Whether groups of the gradient start on a multiple of their size where those of the row do.
  template <typename Gradient>
  __device__ __forceinline__ bool is_aligned(const Gradient* gradient) const {
    constexpr int kBytes = sizeof(Gradient) * kColumns;
    return reinterpret_cast<uintptr_t>(gradient + first) % kBytes == 0;
  }

  template <typename Gradient>
  __device__ __forceinline__ void fill(Gradient* gradient, int steps, E value) const {
    E values[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = value;
    const bool aligned = is_aligned(gradient);
    for (int step = 0; step < steps; ++step) store(gradient, aligned, step, values);
    store_extra(gradient, value);
  }
};

}  // namespace ipo_ext::cuda
