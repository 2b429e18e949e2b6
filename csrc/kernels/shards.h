// Vocabulary parallel: rows of logits of which each rank has some columns. The passes over a row
// are those of kernels/logits.h, given each label as a column of the rank's own; what stands here
// once for both backends are the steps between them, each of a row: its packet, which the ranks
// exchange, and its results, put together of all packets.
#pragma once

#include <cstdint>

#include "kernels/logits.h"
#include "math/row_packet.h"

namespace ipo_ext {

struct ShardArgs {
  LogitsArgs rows;        // of the pass over the rows that this belongs to; its labels are tokens
  int64_t first_column;   // the token of column 0
  int64_t elsewhere = 0;  // what local_column() gives for a token of another rank
  int64_t* columns = nullptr;                 // [rows]: labels as columns
  const void* stats = nullptr;                // [rows, splits] RowStats of the compute dtype
  int64_t splits = 1;                         //
  math::RowPacket* packets = nullptr;         // [rows]
  const math::RowPacket* gathered = nullptr;  // [ranks, rows]
  int64_t ranks = 1;
};

// ---------------------------------------------------------------------------------------------------------------------
// Before a pass over the rows
// ---------------------------------------------------------------------------------------------------------------------

IPO_HOST_DEVICE bool has_column_of(const ShardArgs& args, int64_t label) {
  return label >= args.first_column && label - args.first_column < args.rows.logits.columns;
}

// Returns a row's label as a column; an ignored one stays what it is.
IPO_HOST_DEVICE int64_t local_column(const ShardArgs& args, int64_t row) {
  const int64_t label = label_of(args.rows, row);
  if (label == kIgnoredLabel) return label;
  return has_column_of(args, label) ? label - args.first_column : args.elsewhere;
}

// ---------------------------------------------------------------------------------------------------------------------
// Before the exchange
// ---------------------------------------------------------------------------------------------------------------------

// Returns an active row's packet from the stats of its splits.
template <typename E>
IPO_HOST_DEVICE math::RowPacket packet_of(const ShardArgs& args, int64_t row) {
  if (args.rows.logits.columns == 0)
    return {-std::numeric_limits<double>::infinity(), 0, 0, math::kElsewhere};
  const math::RowStats<E>* splits =
      static_cast<const math::RowStats<E>*>(args.stats) + row * args.splits;
  double row_max = splits[0].row_max;
  for (int64_t split = 1; split < args.splits; ++split)
    row_max = splits[split].row_max > row_max ? splits[split].row_max : row_max;
  const double temperature = temperature_of<E>(args.rows, row);
  math::RowSums sums = {0, 0};
  for (int64_t split = 0; split < args.splits; ++split) {
    const double shift = (splits[split].row_max - row_max) / temperature;
    sums = math::merge(sums, math::shifted(splits[split].sums, shift));
  }
  const E label = math::cap_logit(splits[0].label_logit, static_cast<E>(args.rows.softcap)).value;
  const bool is_mine = has_column_of(args, label_of(args.rows, row));
  return {row_max, sums.sum_exp, sums.sum_exp_x, is_mine ? label : math::kElsewhere};
}

constexpr int32_t kLabelFlag = 2;  // in *args.rows.fault: it is one of a label

template <typename E>
IPO_HOST_DEVICE void store_packet(const ShardArgs& args, int64_t row) {
  if (*args.rows.fault != 0) {
    const double code = *args.rows.fault == kLabelFlag ? math::kLabelFault : math::kFault;
    args.packets[row] = {0, code, 0, math::kElsewhere};
  } else if (!row_is_active(args.rows, row)) {
    args.packets[row] = {0, math::kInactive, 0, math::kElsewhere};
  } else {
    args.packets[row] = packet_of<E>(args, row);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Behind the exchange
// ---------------------------------------------------------------------------------------------------------------------

template <typename E>
IPO_HOST_DEVICE math::GatheredRow gathered_row(const ShardArgs& args, int64_t row) {
  return math::gather_row(args.gathered + row, args.rows.logits.rows, args.ranks,
                          temperature_of<E>(args.rows, row));
}

// Stores a row's results: NaN under a fault.
template <typename E>
IPO_HOST_DEVICE void store_gathered(const ShardArgs& args, int64_t row) {
  if (*args.rows.fault != 0)
    return fill_results(args.rows, row, std::numeric_limits<E>::quiet_NaN());
  const math::GatheredRow gathered = gathered_row<E>(args, row);
  if (gathered.inactive) return fill_results(args.rows, row, E(0));
  const E row_max = static_cast<E>(gathered.row_max);
  const math::RowResult<E> result =
      result_of_row<E>(args.rows, row, gathered.sums, row_max, static_cast<E>(gathered.label));
  store_results(args.rows, row, result, gathered.sums, row_max);
}

namespace cpu {

void local_columns(const ShardArgs& args, const ParallelFor& parallel_for);
void store_packets(const ShardArgs& args, const ParallelFor& parallel_for);
// Adds what it finds to *args.rows.fault.
void find_packet_faults(const ShardArgs& args, const ParallelFor& parallel_for);
void store_gathered_rows(const ShardArgs& args, const ParallelFor& parallel_for);

}  // namespace cpu

namespace cuda {

// As above: each makes one launch on `stream` without synchronising with the host, and returns
// null, or CUDA's words for what failed.
const char* local_columns(const ShardArgs& args, CUstream_st* stream);
const char* store_packets(const ShardArgs& args, CUstream_st* stream);
const char* find_packet_faults(const ShardArgs& args, CUstream_st* stream);
const char* store_gathered_rows(const ShardArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace ipo_ext
