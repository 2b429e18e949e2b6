// Replay of the sampler's support: rows whose label was drawn from a part S of the vocabulary have
// their log-probability, and its derivative, over S. The kernels over whole rows know nothing of
// it: what these do before and after them is read from `replays`, and stands here once for both
// backends.
#pragma once

#include <cstdint>

#include "kernels/logits.h"
#include "math/sequence_rules.h"
#include "math/support.h"

namespace ipo_ext {

struct SupportArgs {
  LogitsArgs rows;     // of the pass over the rows that this belongs to
  const int32_t* ids;  // [rows, width]: each row's S in any order; kNoId where it has fewer
  int64_t width;
  bool checks;       // whether ids are looked at for faults; else they have been
  uint8_t* replays;  // [rows] booleans: active, and S contains the label
  uint8_t* others;   // [rows] booleans: active, and does not replay
  void* row_grads;   // [rows] compute, or null: what the pass over the rows is given in the place
                     // of rows.grad_logprobs, 0 where the row replays
  void* kept;        // [rows, width] compute, or null: the logits of S, read before a gradient is
                     // written over them
  void* stats;       // [2, rows] compute, or null: maximum of S, of capped logits, and its sum of
                     // exponentials
};

constexpr int32_t kNoId = -1;

// The threads that share a row, on the CPU: one. Those of CUDA are a warp.
struct OneThread {
  IPO_HOST_DEVICE int64_t first() const { return 0; }
  IPO_HOST_DEVICE int64_t count() const { return 1; }
  IPO_HOST_DEVICE bool any(bool value) const { return value; }
  template <typename E>
  IPO_HOST_DEVICE E max(E value) const {
    return value;
  }
  IPO_HOST_DEVICE double sum(double value) const { return value; }
  IPO_HOST_DEVICE void sync() const {}
};

IPO_HOST_DEVICE const int32_t* ids_of(const SupportArgs& args, int64_t row) {
  return args.ids + row * args.width;
}

// What a caller must guarantee of an active row: its ids are columns, each there once.
IPO_HOST_DEVICE bool id_is_valid(const SupportArgs& args, const int32_t* ids, int64_t slot) {
  const int32_t id = ids[slot];
  if (id == kNoId) return true;
  int found = id < 0 || id >= args.rows.logits.columns;
  for (int64_t other = 0; other < slot; ++other) found |= ids[other] == id;
  return found == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Steps, each of a row
// ---------------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
#pragma nv_exec_check_disable  // the threads are the backend's
#endif
// Returns whether the row's ids break the contract, and decides whether it replays.
template <typename E, typename Threads>
IPO_HOST_DEVICE bool find_support_of_row(const SupportArgs& args, int64_t row,
                                         const Threads& threads) {
  const int32_t* ids = ids_of(args, row);
  const bool active = row_is_active(args.rows, row);
  const int64_t label = active ? label_of(args.rows, row) : kIgnoredLabel;
  bool has_label = false, fault = false;
  for (int64_t i = threads.first(); active && i < args.width; i += threads.count()) {
    fault |= args.checks && !id_is_valid(args, ids, i);
    has_label |= ids[i] != kNoId && ids[i] == label;
  }
  fault = threads.any(fault);
  const bool replays = threads.any(has_label);
  if (threads.first() == 0) {
    args.replays[row] = replays;
    args.others[row] = active && !replays;
    if (args.row_grads != nullptr)
      static_cast<E*>(args.row_grads)[row] =
          replays ? E(0) : load_token<E>(args.rows.grad_logprobs, row, 0);
  }
  return fault;
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Reads S of a row that replays: its log-probability, but in a backward pass, which has it, and
// what the gradient will be made of, where one is wanted.
template <typename Stored, typename Threads>
IPO_HOST_DEVICE void read_support_of_row(const SupportArgs& args, int64_t row,
                                         const Threads& threads) {
  using E = Compute<Stored>;
  if (!args.replays[row]) return;
  const int32_t* ids = ids_of(args, row);
  const Stored* logits = args.rows.logits.row<Stored>(row);
  const math::LogitScale<E> scale = scale_of<E>(args.rows, row);
  const auto capped = [&](int64_t id) {
    return math::cap_logit(convert<E>(logits[id]), scale.softcap).value;
  };
  E support_max = -std::numeric_limits<E>::infinity();
  for (int64_t i = threads.first(); i < args.width; i += threads.count()) {
    if (ids[i] == kNoId) continue;
    if (args.kept != nullptr)
      static_cast<E*>(args.kept)[row * args.width + i] = convert<E>(logits[ids[i]]);
    support_max = math::larger(capped(ids[i]), support_max);
  }
  support_max = threads.max(support_max);
  double sum_exp = 0;
  for (int64_t i = threads.first(); i < args.width; i += threads.count()) {
    if (ids[i] == kNoId) continue;
    sum_exp += math::row_term(capped(ids[i]), support_max, scale.inverse_temperature).exp;
  }
  sum_exp = threads.sum(sum_exp);
  if (threads.first() != 0) return;
  if (args.stats != nullptr) {
    static_cast<E*>(args.stats)[row] = support_max;
    static_cast<E*>(args.stats)[args.rows.logits.rows + row] = static_cast<E>(sum_exp);
  }
  if (is_backward(args.rows)) return;
  const E label_capped = capped(label_of(args.rows, row));
  static_cast<E*>(args.rows.logprobs)[row] =
      result_of_row<E>(args.rows, row, {sum_exp, 0}, support_max, label_capped).logprob;
}

// Returns what the gradient of a row that replays is made of on S.
template <typename E>
IPO_HOST_DEVICE math::SupportDerivative<E> support_derivative(const SupportArgs& args, int64_t row,
                                                              const math::RowGrads<E>& grads) {
  const math::LogitScale<E> scale = scale_of<E>(args.rows, row);
  const E* stats = static_cast<const E*>(args.stats);
  math::SupportDerivative<E> derivative = {};
  derivative.scale = scale;
  derivative.support_max = stats[row];
  derivative.of_support = math::row_derivative<E>(
      {grads.logprob, 0}, stats[args.rows.logits.rows + row], 0, scale.inverse_temperature);
  if (grads.entropy == 0) return derivative;
  derivative.row_max = saved_row_max<E>(args.rows, row);
  derivative.of_row = math::row_derivative<E>(
      {0, grads.entropy},
      static_cast<const E*>(args.rows.softmax_stats)[args.rows.logits.rows + row],
      static_cast<const E*>(args.rows.entropy)[row], scale.inverse_temperature);
  return derivative;
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Writes the gradient of a row that replays on S. The pass over the rows has written what the
// entropy adds, which is 0 where none of its gradient flows.
template <typename Gradient, typename E, typename Threads>
IPO_HOST_DEVICE void write_support_of_row(const SupportArgs& args, int64_t row,
                                          const Threads& threads) {
  if (!args.replays[row]) return;
  const math::RowGrads<E> upstream = upstream_grads<E>(args.rows, row);
  if (upstream.are_zero()) return;
  const E entropy = upstream.entropy != 0 ? static_cast<const E*>(args.rows.entropy)[row] : E(0);
  const E inverse_temperature = scale_of<E>(args.rows, row).inverse_temperature;
  const math::RowGrads<E> grads = over_scale<Gradient>(args.rows, row, threads.first() == 0,
                                                       upstream, entropy, inverse_temperature);
  Gradient* gradient = args.rows.gradient.row<Gradient>(row);
  if constexpr (std::is_same_v<Gradient, Float16>) {
    // The entropy's part lies over a scale of its own, which may be too small for the sum.
    const math::RowGrads<E> alone = over_scale<Gradient>(
        args.rows, row, false, {E(0), upstream.entropy}, entropy, inverse_temperature);
    if (grads.entropy != alone.entropy) {
      const E factor = grads.entropy / alone.entropy;
      for (int64_t i = threads.first(); i < args.rows.logits.columns; i += threads.count())
        gradient[i] = narrow<Gradient>(convert<E>(gradient[i]) * factor);
      threads.sync();
    }
  }
  const int32_t* ids = ids_of(args, row);
  const int64_t label = label_of(args.rows, row);
  const E* kept = static_cast<const E*>(args.kept) + row * args.width;
  const math::SupportDerivative<E> derivative = support_derivative<E>(args, row, grads);
  for (int64_t i = threads.first(); i < args.width; i += threads.count()) {
    if (ids[i] == kNoId) continue;
    gradient[ids[i]] = narrow<Gradient>(derivative.at(kept[i], ids[i] == label));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Metrics
// ---------------------------------------------------------------------------------------------------------------------

struct ReplayMetricsArgs {
  DType compute_dtype;
  const uint8_t* replays;  // [tokens] booleans, or null: the counts are there already
  TokenInput entropy;      // [tokens] or null
  const uint8_t* active;   // [tokens] booleans
  Segments segments;
  double*
      sums;  // [kNumSumRows + replay::kNumRows, segments], of which the loss has filled the first
  void* means;  // [mean::kNumRows + replay::kNumRows, segments] compute, likewise
};

struct FiniteArgs {
  TokenInput from;  // [count]
  void* to;         // [count] of the same dtype: 0 where `from` is not finite
  int64_t count;
};

// Counts of the tokens of a part of a segment.
struct ReplayCounts {
  int64_t rows[math::replay::kNumRows];
};

IPO_HOST_DEVICE void count_token(const ReplayMetricsArgs& args, int64_t token,
                                 ReplayCounts& counts) {
  if (args.active[token] == 0) return;
  counts.rows[math::replay::replayed] += args.replays[token] != 0;
  counts.rows[math::replay::nonfinite_entropy] +=
      !math::is_finite(load_token<double>(args.entropy, token, 0));
}

// Stores the counts of segment s, or takes those that are there, and their means.
template <typename E>
IPO_HOST_DEVICE void store_replay_rows(const ReplayMetricsArgs& args, int64_t s,
                                       const ReplayCounts& counts) {
  const int64_t segments = args.segments.count;
  const double active = args.sums[math::count::active * segments + s];
  for (int row = 0; row < math::replay::kNumRows; ++row) {
    double& sum = args.sums[(math::kNumSumRows + row) * segments + s];
    if (args.replays != nullptr) sum = static_cast<double>(counts.rows[row]);
    static_cast<E*>(args.means)[(math::mean::kNumRows + row) * segments + s] =
        static_cast<E>(math::ratio_or_zero(sum, active));
  }
}

template <typename E>
IPO_HOST_DEVICE void store_finite(const FiniteArgs& args, int64_t index) {
  const E value = load_token<E>(args.from, index, 0);
  static_cast<E*>(args.to)[index] = math::is_finite(value) ? value : E(0);
}

namespace cpu {

// find_support also fills *args.rows.fault where it is not null: not 0 for a fault.
void find_support(const SupportArgs& args, const ParallelFor& parallel_for);
void read_support(const SupportArgs& args, const ParallelFor& parallel_for);
void write_support(const SupportArgs& args, const ParallelFor& parallel_for);
void replay_metrics(const ReplayMetricsArgs& args);
void finite_values(const FiniteArgs& args);

}  // namespace cpu

namespace cuda {

// Each makes one launch on `stream` without synchronising with the host, and returns null, or
// CUDA's words for what failed. find_support adds its faults to *args.rows.fault, which the others
// read: under a fault they leave what is NaN.
const char* find_support(const SupportArgs& args, CUstream_st* stream);
const char* read_support(const SupportArgs& args, CUstream_st* stream);
const char* write_support(const SupportArgs& args, CUstream_st* stream);
const char* replay_metrics(const ReplayMetricsArgs& args, CUstream_st* stream);
const char* finite_values(const FiniteArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace ipo_ext
