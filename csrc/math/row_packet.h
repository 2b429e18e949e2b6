// What ranks that each have some columns of a row of logits exchange, and the row put together from
// it: on every rank from the same numbers in the same order, so to the same bits.
#pragma once

#include <limits>

#include "math/softmax_row.h"

namespace ipo_ext::math {

// Of the columns of one rank, as they are gathered: in fp64, since log-probabilities near 0 would
// have no digit left of sums in fp32.
struct RowPacket {
  double row_max;    // what was subtracted; -inf where there are no columns, or nothing but -inf
  double sum_exp;    // relative to row_max; else a code below 0, which no sum is
  double sum_exp_x;  //
  double label;      // the label's capped logit; kElsewhere where another rank has its column
};

constexpr double kInactive = -1;    // the row takes no part, says the rank
constexpr double kFault = -2;       // the rank has found a contract fault, in any row
constexpr double kLabelFault = -3;  // the same of a label
constexpr double kElsewhere = std::numeric_limits<double>::infinity();

// A row of all columns.
struct GatheredRow {
  double row_max;
  RowSums sums;
  double label;    // the label's capped logit
  int64_t owners;  // ranks that have its column
  bool inactive;   // on all ranks
  bool fault;      // a rank's own; ranks that disagree; a label that is not of exactly one rank
};

// Takes the sums of a rank's columns to the row's maximum. Those that vanish beside it add nothing;
// a NaN stays.
IPO_HOST_DEVICE RowSums shifted_packet(const RowPacket& packet, double row_max,
                                       double temperature) {
  const double shift = (packet.row_max - row_max) / temperature;
  if (shift < kVanishing<double> && packet.sum_exp >= 0) return {0, 0};
  return shifted({packet.sum_exp, packet.sum_exp_x}, shift);
}

// Puts a row together of its packets, the next `stride` behind the last. A logit of +inf, which
// kElsewhere could be mistaken for, makes a row NaN whoever has the label.
IPO_HOST_DEVICE GatheredRow gather_row(const RowPacket* packets, int64_t stride, int64_t ranks,
                                       double temperature) {
  GatheredRow row = {-std::numeric_limits<double>::infinity(), {0, 0}, 0, 0, false, false};
  int64_t inactive = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const RowPacket& packet = packets[rank * stride];
    row.fault |= packet.sum_exp <= kFault;
    inactive += packet.sum_exp == kInactive;
    if (packet.row_max > row.row_max) row.row_max = packet.row_max;
    if (packet.label == kElsewhere) continue;
    ++row.owners;
    row.label = packet.label;
  }
  row.inactive = inactive == ranks;
  row.fault |= inactive > 0 && !row.inactive;
  row.fault |= !row.inactive && row.owners != 1 && row.row_max < kElsewhere;
  for (int64_t rank = 0; rank < ranks; ++rank)
    row.sums = merge(row.sums, shifted_packet(packets[rank * stride], row.row_max, temperature));
  return row;
}

}  // namespace ipo_ext::math
