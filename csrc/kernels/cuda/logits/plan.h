// Makes the plan of a launch over rows of logits: which kernel walks them, how many blocks have a
// row, and where they keep it between the passes. Host code, and the only place that chooses.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/common/platform.cuh"
#include "kernels/logits.h"

namespace ipo_ext::cuda {

// Bytes of a block's shared memory that reductions use; storage.cuh asserts that they suffice.
constexpr int kStorageBytes = 8192;

// Blocks that a multiprocessor runs at once: 1024 threads of 64 registers fill it.
constexpr int blocks_per_multiprocessor(int threads) { return 1024 / threads; }

// A row of up to so many columns belongs to a cluster of so many blocks, 8 at most.
struct RowShape {
  int64_t columns;
  int blocks;
  int threads;
};

// Resident rows on sm_90 and newer: the smallest cluster that keeps the row on chip with four
// blocks on a multiprocessor, so that some of them load while others wait for a barrier. From
// 163,840 columns on, two large ones.
constexpr RowShape kClusterShapes[] = {
    {16384, 1, 256}, {32768, 2, 256}, {65536, 4, 256}, {163840, 8, 256}, {INT64_MAX, 8, 512},
};

// Pipelined rows need sm_90 or newer, logits of up to 32 bits and no softcap. They serve a row that
// is too large for the registers of a cluster of two, of which a thread gives so many to vectors,
// but not for those of eight, with two blocks on a multiprocessor. Shared memory then has the
// cluster's next row. A cluster has so many rows, or fewer.
constexpr int kPipelinedThreads = 256;
constexpr int kPipelinedVectors = 20;
constexpr int kPipelinedBlocksPerMultiprocessor = 2;
constexpr int kPipelinedClusters[] = {4, 8};
constexpr int kMostRowsPerCluster = 8;
constexpr int kLeastWaves = 4;                 // of the clusters that run at once
constexpr int kVectorBytes = 16;               // of a thread's vector, as it is stored
constexpr int kPipelinedStorageBytes = 14336;  // the same as kStorageBytes, for these rows

// Resident rows before sm_90, and rows that no cluster keeps: one block, which reads again what
// does not fit.
constexpr RowShape kBlockShapes[] = {{8192, 1, 256}, {INT64_MAX, 1, 512}};

// With a softcap, whose arithmetic leaves no registers to keep anything in: large blocks only.
constexpr int kCappedThreads = 512;

// Few rows, which would leave more than half of the device idle, are split among blocks of this
// size.
constexpr int kSplitThreads = 256;

// Streamed rows: this many vectors of a thread for a block that keeps nothing.
constexpr int kStreamThreads = 256;
constexpr int kStreamVectors = 8;

// What the plan of a launch depends on, beside the device.
struct RowWork {
  int64_t rows;
  int64_t columns;
  int vector_columns;       // columns that a thread loads at once
  int compute_bytes;        // of a column that is kept
  int register_vectors;     // that a thread keeps in registers
  bool capped = false;      // there is a softcap: nothing is kept in registers
  bool apart = true;        // blocks that do not wait for each other may write the gradient
  bool reduces = true;      // the rows' sums are not known yet
  bool is_partial = false;  // and are all that is wanted
  bool has_gradient = true;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t vectors_of_row(const RowWork& work) {
  return work.columns / work.vector_columns;  // or one less, by where the row starts
}

inline int64_t vectors_of_thread(const RowWork& work, int64_t blocks, int threads) {
  return divide_up(divide_up(vectors_of_row(work), blocks), threads);
}

template <size_t kCount>
RowShape shape_for(const RowWork& work, const RowShape (&shapes)[kCount]) {
  const RowShape* shape = shapes;
  while (work.columns > shape->columns) ++shape;
  return {work.columns, shape->blocks, work.capped ? kCappedThreads : shape->threads};
}

// Vectors of a thread that must be in shared memory for `blocks` blocks to keep the row.
inline int64_t wanted_shared_vectors(const RowWork& work, int64_t blocks, int threads) {
  const int in_registers = work.capped ? 0 : work.register_vectors;
  return std::max<int64_t>(vectors_of_thread(work, blocks, threads) - in_registers, 0);
}

// Bytes of shared memory for one vector of every thread of a block.
inline int64_t shared_vector_bytes(const RowWork& work, int threads) {
  return int64_t{threads} * work.vector_columns * work.compute_bytes;
}

// Vectors of a thread for which a block finds room: in all that the device gives, or in its part of
// a multiprocessor.
inline int64_t fitting_shared_vectors(const RowWork& work, const Device& device, int threads,
                                      bool with_others) {
  const int its_part = device.shared_bytes_together / blocks_per_multiprocessor(threads) -
                       device.shared_bytes_reserved;
  const int room = with_others ? std::min(its_part, device.shared_bytes) : device.shared_bytes;
  return std::max(room - kStorageBytes, 0) / shared_vector_bytes(work, threads);
}

// The shape in which resident rows are kept, or would be.
inline RowShape resident_shape(const RowWork& work, const Device& device) {
  if (device.capability >= 90) {
    const RowShape cluster = shape_for(work, kClusterShapes);
    if (wanted_shared_vectors(work, cluster.blocks, cluster.threads) <=
        fitting_shared_vectors(work, device, cluster.threads, false))
      return cluster;
  }
  return shape_for(work, kBlockShapes);
}

// Blocks for each of few rows, or 0 where rows are not few.
inline int64_t splits_of_row(const RowWork& work, const Device& device, int resident_blocks) {
  const bool are_few = 2 * work.rows * resident_blocks <= device.multiprocessors;
  if (!work.apart || !work.reduces || !are_few) return 0;
  const int64_t splits = std::min(divide_up(vectors_of_row(work), kSplitThreads),
                                  2 * device.multiprocessors / work.rows);
  return splits < 2 ? 0 : splits;
}

// Leaves the plan as it is where the registers of a small cluster keep the row, or those of none.
inline void plan_pipelined_rows(const RowWork& work, const Device& device, LaunchPlan& plan) {
  const int smallest = kPipelinedClusters[0] / 2;
  if (vectors_of_thread(work, smallest, kPipelinedThreads) <= kPipelinedVectors) return;
  for (const int blocks : kPipelinedClusters) {
    const int64_t vectors = vectors_of_thread(work, blocks, kPipelinedThreads);
    const int64_t bytes = kPipelinedStorageBytes + vectors * kPipelinedThreads * kVectorBytes;
    const bool fits = kPipelinedBlocksPerMultiprocessor * (bytes + device.shared_bytes_reserved) <=
                      device.shared_bytes_together;
    if (vectors > kPipelinedVectors || !fits) continue;
    // Clusters have so many rows that all end at about the same time.
    const int64_t clusters = device.multiprocessors * kPipelinedBlocksPerMultiprocessor / blocks;
    const int64_t each = work.rows / std::max<int64_t>(kLeastWaves * clusters, 1);
    plan.path = RowPath::kPipelined;
    plan.cluster_blocks = blocks;
    plan.threads = kPipelinedThreads;
    plan.vectors = static_cast<int>(vectors);
    plan.shared_bytes = bytes;
    plan.rows_per_cluster =
        static_cast<int>(std::min<int64_t>(std::max<int64_t>(each, 1), kMostRowsPerCluster));
    return;
  }
}

// Fills in how rows are streamed: the backward pass, and the second launch for split rows.
inline void plan_streamed_rows(const RowWork& work, LaunchPlan& plan) {
  const int64_t vectors = vectors_of_thread(work, 1, kStreamThreads);
  const int64_t splits = work.apart ? divide_up(vectors, kStreamVectors) : 1;
  plan.stream_splits = static_cast<int>(std::max<int64_t>(splits, 1));
  plan.stream_vectors = static_cast<int>(work.apart ? kStreamVectors : vectors);
}

// Returns the blocks for each row that is reduced and no more: as many as keep it on chip, or as
// fill the device.
inline int64_t splits_of_partial_row(const RowWork& work, const Device& device) {
  const int in_registers = work.capped ? 0 : work.register_vectors;
  const int64_t kept = std::max<int64_t>(
      in_registers + fitting_shared_vectors(work, device, kSplitThreads, true), 1);
  const int64_t to_keep = divide_up(vectors_of_row(work), kept * kSplitThreads);
  return std::max({to_keep, splits_of_row(work, device, 1), int64_t{1}});
}

inline LaunchPlan plan_rows(const RowWork& work, const Device& device) {
  RowShape shape = resident_shape(work, device);
  const int64_t splits = work.is_partial ? splits_of_partial_row(work, device)
                                         : splits_of_row(work, device, shape.blocks);
  if (splits > 0) shape = {work.columns, 1, kSplitThreads};
  const int64_t blocks = splits > 0 ? splits : shape.blocks;
  const int64_t shared_vectors =
      std::min(wanted_shared_vectors(work, blocks, shape.threads),
               fitting_shared_vectors(work, device, shape.threads, shape.blocks == 1));

  LaunchPlan plan;
  plan.path = splits > 0 ? RowPath::kSplit : RowPath::kResident;
  plan.cluster_blocks = shape.blocks;
  plan.threads = shape.threads;
  plan.vectors = static_cast<int>(vectors_of_thread(work, blocks, shape.threads));
  plan.shared_vectors = static_cast<int>(shared_vectors);
  plan.shared_bytes = kStorageBytes + shared_vectors * shared_vector_bytes(work, shape.threads);
  plan.device_shared_bytes = device.shared_bytes;
  plan.splits = static_cast<int>(splits);
  plan_streamed_rows(work, plan);
  if (splits > 0 && !work.has_gradient) plan.stream_splits = 1;
  if (!work.reduces) plan.path = RowPath::kStreamed;
  const bool may_pipeline = device.capability >= 90 && !work.capped && work.compute_bytes == 4;
  if (plan.path == RowPath::kResident && may_pipeline) plan_pipelined_rows(work, device, plan);
  return plan;
}

}  // namespace ipo_ext::cuda
