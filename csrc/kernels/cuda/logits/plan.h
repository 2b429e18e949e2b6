// How many blocks share a row of logits, and where they hold it: the one place that chooses among
// tier 2's kernels. Host code; it launches nothing.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/common/platform.cuh"

namespace ipo_ext::cuda {

// Of a block's shared memory, what reductions use; static_assert'ed where they are.
constexpr int kStorageBytes = 8192;

// Blocks that a multiprocessor runs at once: 1024 threads of 64 registers fill it.
constexpr int blocks_together(int threads) { return 1024 / threads; }

// A row of up to so many columns: a cluster of so many blocks, 8 at most.
struct RowShape {
  int64_t columns;
  int blocks;
  int threads;
};

// sm_90 and newer, for rows that take no turns (below): the smallest cluster that holds the row
// with four blocks on a multiprocessor, so that some of them load while others wait for a barrier.
// From 163,840 columns on, two large ones.
constexpr RowShape kClusterShapes[] = {
    {16384, 1, 256}, {32768, 2, 256}, {65536, 4, 256}, {163840, 8, 256}, {INT64_MAX, 8, 512},
};

// sm_90 and newer, logits of up to 32 bits, no softcap: a row too large for a cluster of two whose
// blocks hold so many steps a thread in registers, but not for eight, two blocks on a
// multiprocessor. Shared memory then has the cluster's next row: so many in turn, or fewer.
constexpr int kTurnThreads = 256;
constexpr int kTurnSteps = 20;
constexpr int kTurnBlocksTogether = 2;
constexpr int kTurnClusters[] = {4, 8};
constexpr int kMostRowsInTurn = 8;
constexpr int kTurnsAtLeast = 4;
constexpr int kStepBytes = 16;            // of a thread's step, as it is stored
constexpr int kTurnStorageBytes = 14336;  // as kStorageBytes

// Before sm_90, and rows that no cluster holds: one block, which reads again what does not fit.
constexpr RowShape kBlockShapes[] = {{8192, 1, 256}, {INT64_MAX, 1, 512}};

// With a softcap, whose arithmetic leaves no registers to hold anything in: large blocks only.
constexpr int kCappedThreads = 512;

// Few rows, which would leave more than half of the device idle: `parts` blocks of this size for
// each, then a second launch.
constexpr int kPartThreads = 256;

// The second launch, and the backward pass: this many steps for a block that holds nothing.
constexpr int kStreamThreads = 256;
constexpr int kStreamSteps = 8;

struct RowsToShare {
  int64_t rows;
  int64_t columns;
  int group_columns;    // columns that a thread loads at once
  int compute_bytes;    // of one that is held
  int register_steps;   // groups that a thread holds in registers
  bool capped = false;  // a softcap: nothing is held in registers
  bool apart = true;    // whether blocks that do not wait for each other may write the gradient
  bool reduces = true;  // whether the sums are not known yet
};

struct RowSharing {
  int blocks;        // of a row, in a cluster
  int threads;       // of a block
  int steps;         // groups of a thread
  int shared_steps;  // of which this many are held in shared memory
  int parts;         // 0, or for few rows the number of blocks of each
  int stream_parts;  // blocks that write a row's gradient where nothing of it is held
  int stream_steps;  // groups of a thread of those
  int64_t shared_bytes;
  int rows_in_turn = 0;  // of a cluster whose blocks hold rows in registers; 0: this one's do not
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t groups_of(const RowsToShare& rows) {
  return rows.columns / rows.group_columns;  // or one less, by where the row starts
}

template <size_t kCount>
RowShape shape_for(const RowsToShare& rows, const RowShape (&shapes)[kCount]) {
  const RowShape* shape = shapes;
  while (rows.columns > shape->columns) ++shape;
  return {rows.columns, shape->blocks, rows.capped ? kCappedThreads : shape->threads};
}

inline int64_t steps_of(const RowsToShare& rows, int64_t blocks, int threads) {
  return divide_up(divide_up(groups_of(rows), blocks), threads);
}

// Steps in shared memory that `blocks` blocks need to hold the row.
inline int64_t wanted_steps(const RowsToShare& rows, int64_t blocks, int threads) {
  const int in_registers = rows.capped ? 0 : rows.register_steps;
  return std::max<int64_t>(steps_of(rows, blocks, threads) - in_registers, 0);
}

inline int64_t step_bytes(const RowsToShare& rows, int threads) {
  return int64_t{threads} * rows.group_columns * rows.compute_bytes;
}

// Steps for which a block finds room: all that the device gives, or its part of a multiprocessor.
inline int64_t fitting_steps(const RowsToShare& rows, const Device& device, int threads,
                             bool with_others) {
  const int its_part =
      device.shared_bytes_together / blocks_together(threads) - device.shared_bytes_reserved;
  const int room = with_others ? std::min(its_part, device.shared_bytes) : device.shared_bytes;
  return std::max(room - kStorageBytes, 0) / step_bytes(rows, threads);
}

// Leaves `sharing` as it is where registers of a small cluster or of none hold the row.
inline void share_in_turn(const RowsToShare& rows, const Device& device, RowSharing& sharing) {
  if (steps_of(rows, kTurnClusters[0] / 2, kTurnThreads) <= kTurnSteps) return;
  for (const int blocks : kTurnClusters) {
    const int64_t steps = steps_of(rows, blocks, kTurnThreads);
    const int64_t bytes = kTurnStorageBytes + steps * kTurnThreads * kStepBytes;
    const bool fits = kTurnBlocksTogether * (bytes + device.shared_bytes_reserved) <=
                      device.shared_bytes_together;
    if (steps > kTurnSteps || !fits) continue;
    // Every cluster that runs at once gets a few turns, so that all end at about the same time.
    const int64_t clusters = device.multiprocessors * kTurnBlocksTogether / blocks;
    const int64_t each = rows.rows / std::max<int64_t>(kTurnsAtLeast * clusters, 1);
    sharing.blocks = blocks;
    sharing.threads = kTurnThreads;
    sharing.steps = static_cast<int>(steps);
    sharing.shared_bytes = bytes;
    sharing.rows_in_turn =
        static_cast<int>(std::min<int64_t>(std::max<int64_t>(each, 1), kMostRowsInTurn));
    return;
  }
}

inline RowSharing share_rows(const RowsToShare& rows, const Device& device) {
  RowShape shape = shape_for(rows, kBlockShapes);
  if (device.capability >= 90) {
    const RowShape cluster = shape_for(rows, kClusterShapes);
    if (wanted_steps(rows, cluster.blocks, cluster.threads) <=
        fitting_steps(rows, device, cluster.threads, false))
      shape = cluster;
  }
  int64_t parts = 0;
  if (rows.apart && rows.reduces && 2 * rows.rows * shape.blocks <= device.multiprocessors) {
    parts =
        std::min(divide_up(groups_of(rows), kPartThreads), 2 * device.multiprocessors / rows.rows);
    if (parts < 2) parts = 0;
  }
  if (parts > 0) shape = {rows.columns, 1, kPartThreads};

  const int64_t blocks = parts > 0 ? parts : shape.blocks;
  const int64_t steps = std::min(wanted_steps(rows, blocks, shape.threads),
                                 fitting_steps(rows, device, shape.threads, shape.blocks == 1));
  const int64_t stream_steps = steps_of(rows, 1, kStreamThreads);
  const int64_t stream_parts = rows.apart ? divide_up(stream_steps, kStreamSteps) : 1;
  RowSharing sharing = {shape.blocks,
                        shape.threads,
                        static_cast<int>(steps_of(rows, blocks, shape.threads)),
                        static_cast<int>(steps),
                        static_cast<int>(parts),
                        static_cast<int>(std::max<int64_t>(stream_parts, 1)),
                        static_cast<int>(rows.apart ? kStreamSteps : stream_steps),
                        kStorageBytes + steps * step_bytes(rows, shape.threads)};
  const bool may_take_turns = device.capability >= 90 && !rows.capped && rows.compute_bytes == 4;
  if (may_take_turns && parts == 0) share_in_turn(rows, device, sharing);
  return sharing;
}

}  // namespace ipo_ext::cuda
