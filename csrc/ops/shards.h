// The operators of vocabulary parallel: what a rank makes of its columns of the logits, and what it
// makes of what all ranks have made. The exchange itself is Python's.
#pragma once

#include <tuple>

#include "ops/logits.h"

namespace ipo_ext {

// Puts columns of the rank's own in the place of labels, which are tokens, and `elsewhere` for a
// token of another rank. The caller keeps what is returned for as long as the kernels read it.
template <typename Backend>
Tensor take_local_columns(LogitsCall& rows, int64_t first_column, int64_t elsewhere) {
  ShardArgs shard = {rows.args, first_column, elsewhere};
  Tensor columns = empty({rows.args.logits.rows}, ScalarType::Long, rows.on());
  shard.columns = static_cast<int64_t*>(columns.mutable_data_ptr());
  Backend::local_columns(shard, rows.on());
  rows.args.labels = shard.columns;
  rows.args.label_dtype = DType::kInt64;
  return columns;
}

template <typename Backend>
Tensor chunk_packets(const Tensor& logits, const Tensor& labels, const LogitScaling& scaling,
                     const Tensor& fault, int64_t first_column) {
  LogitsCall rows(logits, labels, scaling);
  rows.args.fault = fault_flag(fault, logits);
  ShardArgs shard = {rows.args, first_column};
  Tensor packets = empty({rows.args.logits.rows, 4}, ScalarType::Double, logits);
  shard.packets = static_cast<math::RowPacket*>(packets.mutable_data_ptr());
  Tensor columns, stats;
  // Under a fault labels and temperatures may be anything; on CUDA the kernels look.
  const bool is_read = !Backend::kFaultsRaise || *rows.args.fault == 0;
  if (rows.args.logits.columns > 0 && is_read) {
    columns = take_local_columns<Backend>(rows, first_column, 0);
    stats = rows.run_partial<Backend>(shard.splits);
    shard.stats = rows.args.workspace;
  }
  Backend::store_packets(shard, logits);
  return packets;
}

// CPU only: reads the values, which are the same on all ranks. The word "labels" at the start tells
// Python to raise IndexError.
inline void check_gathered(const ShardArgs& args) {
  if (*args.rows.fault == 0) return;
  const int64_t count = args.rows.logits.rows;
  for (int64_t i = 0; i < args.ranks * count; ++i) {
    const double code = args.gathered[i].sum_exp;
    IPO_EXT_CHECK(code != math::kLabelFault, "labels: rank ", i / count,
                  " of tp_group has been given a token outside of the vocabulary");
    IPO_EXT_CHECK(code != math::kFault, "tp_group: rank ", i / count,
                  " has found a fault in its arguments, which its own error names");
  }
  for (int64_t row = 0; row < count; ++row) {
    const math::GatheredRow gathered = gathered_row<double>(args, row);
    IPO_EXT_CHECK(!gathered.fault || gathered.owners == 1,
                  "labels: expected a token in the shard of one rank of tp_group wherever a row is "
                  "active, got one that ",
                  gathered.owners, " of ", args.ranks, " ranks have, at row ", row,
                  "; give all ranks the same labels, and shards that make up the vocabulary");
    IPO_EXT_CHECK(!gathered.fault,
                  "tp_group: expected ranks that are given the same tokens, got row ", row,
                  ", which takes part on some of them");
  }
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> gather_packets(const Tensor& packets, const Tensor& labels,
                                                  const std::optional<Tensor>& temperature,
                                                  const Tensor& fault, bool float64) {
  RowsCall rows(labels, 0, temperature);
  const int64_t count = rows.args.logits.rows;
  IPO_EXT_CHECK(packets.scalar_type() == ScalarType::Double && packets.is_contiguous() &&
                    same_device(packets, labels) && packets.numel() >= 4 * count &&
                    (count == 0 ? packets.numel() == 0 : packets.numel() % (4 * count) == 0),
                "packets: expected contiguous float64 [ranks, ", count,
                ", 4] on the device of labels");
  const ScalarType dtype = float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor logprobs = empty(sizes_of(labels), dtype, labels);
  const Tensor entropy = empty(sizes_of(labels), dtype, labels);
  const Tensor softmax_stats = empty({2, count}, dtype, labels);
  rows.args.compute_dtype = float64 ? DType::kFloat64 : DType::kFloat32;
  rows.args.logprobs = logprobs.mutable_data_ptr();
  rows.args.entropy = entropy.mutable_data_ptr();
  rows.args.softmax_stats = softmax_stats.mutable_data_ptr();
  rows.args.fault = fault_flag(fault, labels);
  ShardArgs shard = {rows.args, 0};
  shard.gathered = static_cast<const math::RowPacket*>(packets.const_data_ptr());
  shard.ranks = count == 0 ? 0 : packets.numel() / (4 * count);
  Backend::find_packet_faults(shard, labels);
  if constexpr (Backend::kFaultsRaise) check_gathered(shard);
  Backend::store_gathered_rows(shard, labels);
  return {logprobs, entropy, softmax_stats};
}

template <typename Backend>
void chunk_shard_backward(const Tensor& logits, const Tensor& labels, const LogitScaling& scaling,
                          const Tensor& entropy, const Tensor& softmax_stats,
                          const Tensor& grad_logprobs, const Tensor& grad_entropy,
                          const Tensor& fault, int64_t first_column, const Tensor& gradient,
                          const std::optional<Tensor>& row_scales) {
  LogitsCall rows(logits, labels, scaling);
  rows.write_gradient_to(gradient);
  rows.write_row_scales_to(row_scales);
  rows.args.fault = fault_flag(fault, logits);
  const Tensor columns = take_local_columns<Backend>(rows, first_column, rows.args.logits.columns);
  Replay no_replay(rows, std::nullopt, true);
  backward_rows<Backend>(rows, no_replay, false, entropy, softmax_stats, grad_logprobs,
                         grad_entropy, std::nullopt);
}

}  // namespace ipo_ext
