// Sums of tokens by rows: a lane has one row of them, so that what few warps or slots hold is read
// side by side and merged in all rows at once. The orders are fixed, and the bits the same every
// run.
#pragma once

#include "kernels/cuda/common/reduce.cuh"
#include "math/metrics.h"

namespace ipo_ext::cuda {

// The rows of TileSums: sums, counts, then the two extremes.
constexpr int kFirstCountRow = math::sum::kNumRows;
constexpr int kFirstExtremeRow = kFirstCountRow + math::count::kNumRows;
constexpr int kTileRows = kFirstExtremeRow + math::extreme::kNumRows;
static_assert(kTileRows + math::of_segment::kNumRows <= kWarpSize &&
                  math::mean::kNumRows <= kWarpSize,
              "a warp has a lane for each row of the metrics");

// A row as it is stored, in as few registers: rows of several tiles are loaded before the first is
// waited for, as a conversion would.
template <typename E>
struct StoredRow {
  using Bits = typename math::Lanes<E>::Unsigned;
  uint64_t bits = 0;

  // Loads nothing for a lane without a row.
  __device__ __forceinline__ void load(const math::TileSums<E>& tile, int row) {
    if (row < kFirstCountRow) {
      const double sum = tile.sums[row];  // copied: of memory bit_cast would load bytes
      bits = math::bit_cast<uint64_t>(sum);
    } else if (row < kFirstExtremeRow) {
      bits = tile.counts[row - kFirstCountRow];
    } else if (row < kTileRows) {
      const E extreme = row == kFirstExtremeRow ? tile.log_ratio_min : tile.log_ratio_max;
      bits = math::bit_cast<Bits>(extreme);
    }
  }
  __device__ __forceinline__ double value(int row) const {
    if (row < kFirstCountRow) return math::bit_cast<double>(bits);
    if (row < kFirstExtremeRow) return static_cast<double>(static_cast<uint32_t>(bits));
    return static_cast<double>(math::bit_cast<E>(static_cast<Bits>(bits)));
  }
};

// Stores nothing for a lane without a row.
template <typename E>
__device__ __forceinline__ void store_row(double value, int row, math::TileSums<E>& tile) {
  if (row < kFirstCountRow) {
    tile.sums[row] = value;
  } else if (row < kFirstExtremeRow) {
    tile.counts[row - kFirstCountRow] = static_cast<uint32_t>(value);
  } else if (row < kTileRows) {
    (row == kFirstExtremeRow ? tile.log_ratio_min : tile.log_ratio_max) = static_cast<E>(value);
  }
}

// Stores to a segment, whose rows come in another order; the rows that only a segment has begin as
// 0.
__device__ __forceinline__ void store_row(double value, int row, math::SegmentSums& segment) {
  if (row < kFirstCountRow) {
    segment.sums[math::count::kNumRows + row] = value;
  } else if (row < kFirstExtremeRow) {
    segment.sums[row - kFirstCountRow] = value;
  } else if (row < kTileRows) {
    segment.extremes[row - kFirstExtremeRow] = value;
  } else if (row < kTileRows + math::of_segment::kNumRows) {
    segment.sums[math::kFirstSegmentRow + row - kTileRows] = 0;
  }
}

__device__ __forceinline__ double empty_row(int row) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return row < kFirstExtremeRow ? 0 : (row == kFirstExtremeRow ? kInfinity : -kInfinity);
}

__device__ __forceinline__ double merge_rows(double a, double b, int row) {
  if (row < kFirstExtremeRow) return a + b;
  return row == kFirstExtremeRow ? math::smaller(a, b) : math::larger(a, b);
}

// Merges `merged` with the same row of kCount tiles, without those that has(i) says are not there.
template <int kCount, typename E, typename Has>
__device__ __forceinline__ double merge_tiles(double merged, const math::TileSums<E>* tiles,
                                              int row, const Has& has) {
  StoredRow<E> rows[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (has(i)) rows[i].load(tiles[i], row);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    merged = merge_rows(merged, has(i) ? rows[i].value(row) : empty_row(row), row);
  return merged;
}

// Merges kValues numbers of each lane over the warp and returns number lane / (kWarpSize /
// kValues): each round sends away the half of the first kCount numbers that another lane goes on
// with. All lanes must call.
template <int kCount, int kMask, typename T, int kValues, typename Merge>
__device__ __forceinline__ T warp_reduce_round(T (&mine)[kValues], const Merge& merge) {
  if constexpr (kMask == 0) {
    return mine[0];
  } else if constexpr (kCount == 1) {
    mine[0] = merge(mine[0], shuffle_xor(mine[0], kMask));
    return warp_reduce_round<1, kMask / 2>(mine, merge);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = threadIdx.x & kMask;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T away = upper ? mine[i] : mine[i + kHalf];
      const T kept = upper ? mine[i + kHalf] : mine[i];
      mine[i] = merge(kept, shuffle_xor(away, kMask));
    }
    return warp_reduce_round<kHalf, kMask / 2>(mine, merge);
  }
}
template <typename T, int kValues, typename Merge>
__device__ __forceinline__ T warp_reduce_each(const T (&values)[kValues], const Merge& merge) {
  T mine[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) mine[i] = values[i];
  return warp_reduce_round<kValues, kWarpSize / 2>(mine, merge);
}

constexpr int power_of_two_from(int count) {
  int power = 1;
  while (power < count) power *= 2;
  return power;
}

// The lanes that have the same number of kRows that are reduced over a warp, padded to as many as a
// tree of lanes has leaves.
template <int kRows>
constexpr int kLanesOfRow = kWarpSize / power_of_two_from(kRows);

// Adds each of kRows numbers over the warp and returns number lane / kLanesOfRow<kRows>. All lanes
// must call.
template <typename T, int kRows>
__device__ __forceinline__ T warp_sum_each(const T (&rows)[kRows]) {
  T padded[power_of_two_from(kRows)] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) padded[i] = rows[i];
  return warp_reduce_each(padded, [](T a, T b) { return a + b; });
}

// Stores what warp_sum_each() has returned to each lane.
template <typename T, int kRows>
__device__ __forceinline__ void store_each(T sum, T (&to)[kRows]) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / kLanesOfRow<kRows>;
  if (lane % kLanesOfRow<kRows> == 0 && row < kRows) to[row] = sum;
}

// Stores the merged sums of the warp to `tile`, which its lanes fill together: valid for other
// threads after a barrier. Returns to all lanes what they add to the loss. All lanes must call.
template <typename E>
__device__ __forceinline__ double warp_reduce_to(const math::TileSums<E>& sums,
                                                 math::TileSums<E>& tile) {
  const E extremes[] = {sums.log_ratio_min, -sums.log_ratio_max};
  const double sum = warp_sum_each(sums.sums);
  const uint32_t count = warp_sum_each(sums.counts);
  const E smallest = warp_reduce_each(extremes, [](E a, E b) { return math::smaller(a, b); });
  store_each(sum, tile.sums);
  store_each(count, tile.counts);
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) tile.log_ratio_min = smallest;
  if (lane == kWarpSize / 2) tile.log_ratio_max = -smallest;
  constexpr int kLanes = kLanesOfRow<math::sum::kNumRows>;
  return __shfl_sync(kFullWarp, sum, math::sum::pg_loss * kLanes) +
         __shfl_sync(kFullWarp, sum, math::sum::kl_loss * kLanes);
}

struct MergeBoundCounts {
  template <typename E>
  __device__ __forceinline__ math::BoundCounts<E> operator()(const math::BoundCounts<E>& a,
                                                             const math::BoundCounts<E>& b) const {
    return math::merge(a, b);
  }
};

}  // namespace ipo_ext::cuda
