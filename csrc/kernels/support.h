// Replay of the sampler's support: rows whose label was drawn from a part S of the vocabulary have
// their log-probability, and its derivative, over S. And log-probabilities of other ids than the
// label, candidates, over S or over all. The kernels over whole rows know nothing of either: what
// is done before and after them stands here once for both backends.
#pragma once

#include <cstdint>

#include "kernels/logits.h"
#include "kernels/one_thread.h"
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
                     // of rows.grad_logprobs, 0 where the row replays, else the sum over all ids
  void* kept;        // [rows, width] compute, or null: the logits of S, read before a gradient is
                     // written over them
  void* stats;       // [2, rows] compute, or null: maximum of S, of capped logits, and its sum of
                     // exponentials

  const int32_t* candidates;    // [rows, num_candidates], kNoId where a row has fewer; or null
  int64_t num_candidates;       //
  bool only_replayed;           // whether rows that do not replay have no candidates
  void* candidate_logprobs;     // [rows, num_candidates] compute; in a forward pass
  const void* grad_candidates;  // [rows, num_candidates] compute; in a backward pass
  void* kept_candidates;        // [rows, num_candidates + 1] compute, likewise: the logits of the
                                // candidates and of the label, of a row that does not replay
};

constexpr int32_t kNoId = -1;

IPO_HOST_DEVICE const int32_t* ids_of(const SupportArgs& args, int64_t row) {
  return args.ids + row * args.width;
}

IPO_HOST_DEVICE const int32_t* candidates_of(const SupportArgs& args, int64_t row) {
  return args.candidates + row * args.num_candidates;
}

// Returns whether an earlier place holds the same id.
IPO_HOST_DEVICE bool is_repeated(const int32_t* ids, int64_t place) {
  int found = 0;
  for (int64_t other = 0; other < place; ++other) found |= ids[other] == ids[place];
  return found != 0;
}

// What a caller must guarantee of an active row: its ids are columns, each there once.
IPO_HOST_DEVICE bool id_is_valid(const SupportArgs& args, const int32_t* ids, int64_t slot) {
  const int32_t id = ids[slot];
  if (id == kNoId) return true;
  return id >= 0 && id < args.rows.logits.columns && !is_repeated(ids, slot);
}

IPO_HOST_DEVICE bool candidate_is_valid(const SupportArgs& args, int32_t id) {
  return id == kNoId || (id >= 0 && id < args.rows.logits.columns);
}

// Returns whether S contains an id, which is often at its own place.
IPO_HOST_DEVICE bool support_contains(const SupportArgs& args, int64_t row, int32_t id,
                                      int64_t place) {
  const int32_t* ids = ids_of(args, row);
  if (place < args.width && ids[place] == id) return true;
  int found = 0;
  for (int64_t i = 0; i < args.width; ++i) found |= ids[i] == id;
  return found != 0;
}

// Returns whether the row has a log-probability of a candidate that is more than a constant.
IPO_HOST_DEVICE bool candidate_counts(const SupportArgs& args, int64_t row, int64_t place) {
  const int32_t id = candidates_of(args, row)[place];
  if (id == kNoId) return false;
  return !args.replays[row] || support_contains(args, row, id, place);
}

// The gradient by a candidate's log-probability, 0 where that is a constant.
template <typename E>
IPO_HOST_DEVICE E grad_candidate(const SupportArgs& args, int64_t row, int64_t place) {
  if (!candidate_counts(args, row, place)) return 0;
  return static_cast<const E*>(args.grad_candidates)[row * args.num_candidates + place];
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
  const bool replays = threads.any(has_label);
  const bool has_grads = args.row_grads != nullptr && active && !replays;
  double grad = 0;
  for (int64_t i = threads.first(); active && i < args.num_candidates; i += threads.count()) {
    const int32_t id = candidates_of(args, row)[i];
    fault |= args.checks && !candidate_is_valid(args, id);
    if (has_grads && id != kNoId)
      grad += static_cast<const E*>(args.grad_candidates)[row * args.num_candidates + i];
  }
  fault = threads.any(fault);
  grad = threads.sum(grad);
  if (threads.first() == 0) {
    args.replays[row] = replays;
    args.others[row] = active && !replays;
    if (has_grads) grad += load_token<E>(args.rows.grad_logprobs, row, 0);
    if (args.row_grads != nullptr) static_cast<E*>(args.row_grads)[row] = static_cast<E>(grad);
  }
  return fault;
}

// Maximum and sum of exponentials of the logits over which a row's log-probabilities are.
template <typename E>
struct SupportStats {
  E max;
  double sum_exp;
};

template <typename Stored>
IPO_HOST_DEVICE Compute<Stored> capped_logit(const SupportArgs& args, int64_t row, int64_t id) {
  using E = Compute<Stored>;
  const E logit = convert<E>(args.rows.logits.row<Stored>(row)[id]);
  return math::cap_logit(logit, static_cast<E>(args.rows.softcap)).value;
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Reduces S of a row that replays.
template <typename Stored, typename Threads>
IPO_HOST_DEVICE SupportStats<Compute<Stored>> reduce_support(const SupportArgs& args, int64_t row,
                                                             const Threads& threads) {
  using E = Compute<Stored>;
  const int32_t* ids = ids_of(args, row);
  const E inverse_temperature = scale_of<E>(args.rows, row).inverse_temperature;
  E support_max = -std::numeric_limits<E>::infinity();
  for (int64_t i = threads.first(); i < args.width; i += threads.count()) {
    if (ids[i] == kNoId) continue;
    support_max = math::larger(capped_logit<Stored>(args, row, ids[i]), support_max);
  }
  support_max = threads.max(support_max);
  double sum_exp = 0;
  for (int64_t i = threads.first(); i < args.width; i += threads.count()) {
    if (ids[i] == kNoId) continue;
    const E capped = capped_logit<Stored>(args, row, ids[i]);
    sum_exp += math::row_term(capped, support_max, inverse_temperature).exp;
  }
  return {support_max, threads.sum(sum_exp)};
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Keeps the logits that the gradient will be made of, before it is written over them.
template <typename Stored, typename Threads>
IPO_HOST_DEVICE void keep_logits(const SupportArgs& args, int64_t row, const Threads& threads) {
  using E = Compute<Stored>;
  const Stored* logits = args.rows.logits.row<Stored>(row);
  const bool replays = args.replays[row] != 0;
  const int32_t* ids = replays ? ids_of(args, row) : candidates_of(args, row);
  const int64_t count = replays ? args.width : args.num_candidates;
  E* kept = replays ? static_cast<E*>(args.kept) + row * count
                    : static_cast<E*>(args.kept_candidates) + row * (count + 1);
  for (int64_t i = threads.first(); i < count; i += threads.count()) {
    if (ids[i] != kNoId) kept[i] = convert<E>(logits[ids[i]]);
  }
  if (!replays && threads.first() == 0) kept[count] = convert<E>(logits[label_of(args.rows, row)]);
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Stores the candidates' log-probabilities of an active row. Over S, those outside have none.
template <typename Stored, typename Threads>
IPO_HOST_DEVICE void store_candidates(const SupportArgs& args, int64_t row,
                                      const SupportStats<Compute<Stored>>& stats,
                                      const Threads& threads) {
  using E = Compute<Stored>;
  const int32_t* ids = candidates_of(args, row);
  E* logprobs = static_cast<E*>(args.candidate_logprobs) + row * args.num_candidates;
  for (int64_t i = threads.first(); i < args.num_candidates; i += threads.count()) {
    E logprob = ids[i] == kNoId ? E(0) : -std::numeric_limits<E>::infinity();
    if (candidate_counts(args, row, i))
      logprob = result_of_row<E>(args.rows, row, {stats.sum_exp, 0}, stats.max,
                                 capped_logit<Stored>(args, row, ids[i]))
                    .logprob;
    logprobs[i] = logprob;
  }
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Fills the candidates' log-probabilities of a row that has none: 0 for an inactive one, NaN under
// a fault.
template <typename E, typename Threads>
IPO_HOST_DEVICE void fill_candidates(const SupportArgs& args, int64_t row, E value,
                                     const Threads& threads) {
  if (args.candidate_logprobs == nullptr) return;
  for (int64_t i = threads.first(); i < args.num_candidates; i += threads.count())
    static_cast<E*>(args.candidate_logprobs)[row * args.num_candidates + i] = value;
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Reads S of a row that replays, and the candidates of any: their log-probabilities, but in a
// backward pass, which has them, and what the gradient will be made of, where one is wanted.
template <typename Stored, typename Threads>
IPO_HOST_DEVICE void read_support_of_row(const SupportArgs& args, int64_t row,
                                         const Threads& threads) {
  using E = Compute<Stored>;
  const bool replays = args.replays[row] != 0;
  if (!replays && !args.others[row]) return fill_candidates(args, row, E(0), threads);
  if (!replays && args.only_replayed) return fill_candidates(args, row, E(0), threads);
  if (!replays && args.candidates == nullptr) return;
  if (args.stats != nullptr) keep_logits<Stored>(args, row, threads);
  SupportStats<E> stats;
  if (replays) {
    stats = reduce_support<Stored>(args, row, threads);
  } else {
    const E* of_row = static_cast<const E*>(args.rows.softmax_stats);
    stats = {of_row[row], of_row[args.rows.logits.rows + row]};
  }
  if (args.candidate_logprobs != nullptr) store_candidates<Stored>(args, row, stats, threads);
  if (threads.first() != 0) return;
  if (args.stats != nullptr) {
    static_cast<E*>(args.stats)[row] = stats.max;
    static_cast<E*>(args.stats)[args.rows.logits.rows + row] = static_cast<E>(stats.sum_exp);
  }
  if (is_backward(args.rows) || !replays) return;
  const E label_capped = capped_logit<Stored>(args, row, label_of(args.rows, row));
  static_cast<E*>(args.rows.logprobs)[row] =
      result_of_row<E>(args.rows, row, {stats.sum_exp, 0}, stats.max, label_capped).logprob;
}

// What flows into a row's log-probabilities.
template <typename E>
struct SupportGrads {
  E label;
  E sum;    // of the label's and the candidates'
  E bound;  // of each derivative, the temperature aside
};

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename E, typename Threads>
IPO_HOST_DEVICE SupportGrads<E> support_grads(const SupportArgs& args, int64_t row, E label,
                                              const Threads& threads) {
  const E size = label < 0 ? -label : label;
  if (args.candidates == nullptr) return {label, label, size};
  double sum = 0, sizes = 0;
  for (int64_t i = threads.first(); i < args.num_candidates; i += threads.count()) {
    const double grad = grad_candidate<E>(args, row, i);
    sum += grad;
    sizes += grad < 0 ? -grad : grad;
  }
  sum = threads.sum(sum) + label;
  sizes = threads.sum(sizes) + size;
  return {label, static_cast<E>(sum), static_cast<E>(2 * sizes)};  // own, and the sum's share
}

// Returns the gradient by the log-probability of an id: as the label, and as candidates.
template <typename E>
IPO_HOST_DEVICE E own_grad(const SupportArgs& args, int64_t row, int32_t id, E grad_label) {
  double grad = id == label_of(args.rows, row) ? grad_label : E(0);
#if defined(__CUDACC__)
#pragma unroll 1  // or ptxas runs out of registers in fp64 on sm_100
#endif
  for (int64_t i = 0; i < args.num_candidates; ++i) {
    if (candidates_of(args, row)[i] == id) grad += grad_candidate<E>(args, row, i);
  }
  return static_cast<E>(grad);
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Takes a row of an fp16 gradient, which the pass over the rows has stored over the scale of what
// it was given, to the scale of all that flows. Returns what is still to be multiplied by.
template <typename Gradient, typename E, typename Threads>
IPO_HOST_DEVICE E rescale_row(const SupportArgs& args, int64_t row, const math::RowGrads<E>& passed,
                              const math::RowGrads<E>& all, E entropy, const Threads& threads) {
  if constexpr (std::is_same_v<Gradient, Float16>) {
    if (args.rows.row_scales == nullptr) return 1;
    const E inverse_temperature = scale_of<E>(args.rows, row).inverse_temperature;
    const math::RowScale before =
        math::fp16_scale(math::derivative_bound(passed, entropy, inverse_temperature));
    const math::RowScale scale =
        math::fp16_scale(math::derivative_bound(all, entropy, inverse_temperature));
    if (threads.first() == 0) args.rows.row_scales[row] = scale.scale;
    const E factor = before.scale * scale.inverse;
    if (factor != 1 && !passed.are_zero()) {
      Gradient* gradient = args.rows.gradient.row<Gradient>(row);
      for (int64_t i = threads.first(); i < args.rows.logits.columns; i += threads.count())
        gradient[i] = narrow<Gradient>(convert<E>(gradient[i]) * factor);
      threads.sync();
    }
    return scale.inverse;
  } else {
    return 1;
  }
}

// Returns what the gradient of a row is made of at the ids of which it gives log-probabilities.
template <typename E>
IPO_HOST_DEVICE math::SupportDerivative<E> support_derivative(const SupportArgs& args, int64_t row,
                                                              const math::RowGrads<E>& grads) {
  const math::LogitScale<E> scale = scale_of<E>(args.rows, row);
  const int64_t rows = args.rows.logits.rows;
  const E* stats = static_cast<const E*>(args.stats);
  math::SupportDerivative<E> derivative = {};
  derivative.scale = scale;
  derivative.support_max = stats[row];
  derivative.of_support =
      math::row_derivative<E>({grads.logprob, 0}, stats[rows + row], 0, scale.inverse_temperature);
  if (grads.entropy == 0) return derivative;
  derivative.row_max = saved_row_max<E>(args.rows, row);
  derivative.of_row = math::row_derivative<E>(
      {0, grads.entropy}, static_cast<const E*>(args.rows.softmax_stats)[rows + row],
      static_cast<const E*>(args.rows.entropy)[row], scale.inverse_temperature);
  return derivative;
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Writes the gradient of a row at the ids of which it gives log-probabilities: S where it replays,
// else the candidates and the label, if there are candidates. Each element is stored once. The pass
// over the rows has written all others.
template <typename Gradient, typename E, typename Threads>
IPO_HOST_DEVICE void write_support_of_row(const SupportArgs& args, int64_t row,
                                          const Threads& threads) {
  const bool replays = args.replays[row] != 0;
  const bool has_candidates = args.candidates != nullptr && !args.only_replayed;
  if (!replays && (!has_candidates || !args.others[row])) return;
  const math::RowGrads<E> upstream = upstream_grads<E>(args.rows, row);
  const SupportGrads<E> by_logprobs = support_grads<E>(args, row, upstream.logprob, threads);
  const math::RowGrads<E> all = {by_logprobs.bound, upstream.entropy};
  if (all.are_zero()) return;
  const E entropy = upstream.entropy != 0 ? static_cast<const E*>(args.rows.entropy)[row] : E(0);
  const E passed = replays ? E(0) : static_cast<const E*>(args.row_grads)[row];
  const E unit =
      rescale_row<Gradient>(args, row, {passed, upstream.entropy}, all, entropy, threads);
  const math::SupportDerivative<E> derivative =
      support_derivative<E>(args, row, {by_logprobs.sum * unit, upstream.entropy * unit});

  Gradient* gradient = args.rows.gradient.row<Gradient>(row);
  const auto write = [&](int32_t id, E logit) {
    const E own = own_grad<E>(args, row, id, by_logprobs.label) * unit;
    gradient[id] = narrow<Gradient>(derivative.at(logit, own));
  };
  if (replays) {
    const int32_t* ids = ids_of(args, row);
    const E* kept = static_cast<const E*>(args.kept) + row * args.width;
    for (int64_t i = threads.first(); i < args.width; i += threads.count()) {
      if (ids[i] != kNoId) write(ids[i], kept[i]);
    }
    return;
  }
  const int32_t* ids = candidates_of(args, row);
  const int32_t label = static_cast<int32_t>(label_of(args.rows, row));
  const E* kept = static_cast<const E*>(args.kept_candidates) + row * (args.num_candidates + 1);
  for (int64_t i = threads.first(); i < args.num_candidates; i += threads.count()) {
    if (ids[i] != kNoId && ids[i] != label && !is_repeated(ids, i)) write(ids[i], kept[i]);
  }
  if (threads.first() == 0) write(label, kept[args.num_candidates]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Metrics
// ---------------------------------------------------------------------------------------------------------------------

struct ReplayMetricsArgs {
  DType compute_dtype;
  bool counts;             // whether tokens are counted; else the sums are there already
  const uint8_t* replays;  // [tokens] booleans
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
  int64_t rows[math::replay::kNumCounts];
};

IPO_HOST_DEVICE void count_token(const ReplayMetricsArgs& args, int64_t token,
                                 ReplayCounts& counts) {
  if (args.active[token] == 0) return;
  counts.rows[math::replay::replayed] += args.replays[token] != 0;
  counts.rows[math::replay::nonfinite_entropy] +=
      !math::is_finite(load_token<double>(args.entropy, token, 0));
}

// Stores the counts of segment s and nothing for what others measure, or takes the sums that are
// there, and the means.
template <typename E>
IPO_HOST_DEVICE void store_replay_rows(const ReplayMetricsArgs& args, int64_t s,
                                       const ReplayCounts& counts) {
  const int64_t segments = args.segments.count;
  const double active = args.sums[math::count::active * segments + s];
  for (int row = 0; row < math::replay::kNumRows; ++row) {
    double& sum = args.sums[(math::kNumSumRows + row) * segments + s];
    if (args.counts)
      sum = row < math::replay::kNumCounts ? static_cast<double>(counts.rows[row]) : 0;
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
