// From logits: log-probabilities, entropies and the gradient straight from a matrix of logits, one
// row for each token. What a row means stands here, once for both backends; they only differ in how
// they walk it.
#pragma once

#include <cstdint>

#include "kernels/ipo_loss.h"
#include "kernels/matrix.h"
#include "math/softmax_row.h"

namespace ipo_ext {

// What a pass over the rows is for.
enum class LogitsMode : int32_t {
  kForward,   // log-probabilities, entropies and, where wanted, softmax_stats
  kLoss,      // log-probabilities, entropies and the gradient of their loss
  kBackward,  // the gradient, from derivatives by log-probabilities and entropies and from what the
              // forward pass has left: entropies and softmax_stats
  kPartial,   // RowStats of the compute dtype in the workspace, of each row in as many splits as
              // the plan has: for a matrix that has some of the vocabulary's columns
};

struct LogitsArgs {
  DType compute_dtype;  // kFloat64 for fp64 logits, else kFloat32; called "compute" below
  LogitsMode mode = LogitsMode::kForward;
  LogitsMatrix logits;    // [rows, columns]
  LogitsMatrix gradient;  // [rows, columns]; no data where none is wanted. Of the logits' dtype,
                          // or fp16 or bf16 for fp32 logits; each of its rows may start where
                          // that row of the logits does, which it then overwrites
  float* row_scales = nullptr;  // [rows]: an fp16 gradient is stored over them, see over_scale; or
                                // null, always for other gradients: stored as it is
  int64_t max_active = std::numeric_limits<int64_t>::max();  // what the caller has promised
  const uint8_t* active = nullptr;  // [rows] as loss.loss_mask, or null: rows whose label is not
                                    // kIgnoredLabel
  const void* labels;               // [rows] int32 or int64; kBackward: one that is no column is
                                    // another rank's
  DType label_dtype;                //
  TokenInput temperatures;          // [rows], or null:
  ScalarInput temperature;          // one for all rows
  double softcap;                   // 0 for none
  IpoLossArgs loss = {};     // kLoss: tokens are the rows; its trainer_logprobs and outputs are
                             // not used
  void* logprobs = nullptr;  // [rows] compute; kForward, kLoss
  void* entropy = nullptr;   // [rows] compute; kBackward reads it
  void* softmax_stats = nullptr;  // [2, rows] compute: the row's maximum, of capped logits, and its
                                  // sum of exponentials; kBackward reads it; else null where
                                  // nothing will need them
  TokenInput grad_logprobs;       // [rows]; kBackward
  TokenInput grad_entropy;        // [rows], or null: 0; kBackward
  int32_t* fault = nullptr;       // [1], CUDA: filled by find_faults; not 0 poisons
  void* workspace = nullptr;      // [plan.workspace_bytes], CUDA: aligned to 16 bytes
};

constexpr int64_t kIgnoredLabel = -100;

IPO_HOST_DEVICE bool has_loss(const LogitsArgs& args) { return args.mode == LogitsMode::kLoss; }
IPO_HOST_DEVICE bool is_backward(const LogitsArgs& args) {
  return args.mode == LogitsMode::kBackward;
}

IPO_HOST_DEVICE int64_t label_of(const LogitsArgs& args, int64_t row) {
  return load_element<int64_t>(args.labels, args.label_dtype, row);
}

IPO_HOST_DEVICE double given_temperature(const LogitsArgs& args, int64_t row) {
  return args.temperatures.data != nullptr ? load_token<double>(args.temperatures, row, 1)
                                           : load_scalar(args.temperature);
}

template <typename E>
IPO_HOST_DEVICE double temperature_of(const LogitsArgs& args, int64_t row) {
  const double temperature = given_temperature(args, row);
  constexpr double kHighest = math::kHighestTemperature<E>;
  if (!(temperature < kHighest)) return kHighest;
  return temperature > 1 / kHighest ? temperature : 1 / kHighest;
}

template <typename E>
IPO_HOST_DEVICE math::LogitScale<E> scale_of(const LogitsArgs& args, int64_t row) {
  return {static_cast<E>(args.softcap), static_cast<E>(1 / temperature_of<E>(args, row))};
}

// Returns whether a row takes part; one that does not is never read, and neither is its label.
IPO_HOST_DEVICE bool row_is_active(const LogitsArgs& args, int64_t row) {
  return args.active != nullptr ? args.active[row] != 0 : label_of(args, row) != kIgnoredLabel;
}

// What a caller must guarantee of an active row: label_is_valid and temperature_is_valid.
IPO_HOST_DEVICE bool label_is_valid(const LogitsArgs& args, int64_t row) {
  const int64_t label = label_of(args, row);
  return label >= 0 && label < args.logits.columns;
}
IPO_HOST_DEVICE bool temperature_is_valid(const LogitsArgs& args, int64_t row) {
  const double temperature = given_temperature(args, row);
  return temperature > 0 && temperature <= std::numeric_limits<double>::max();
}

// Stores the results of a row that was not reduced: 0 for an inactive one, NaN under a fault.
template <typename E>
IPO_HOST_DEVICE void fill_results(const LogitsArgs& args, int64_t row, E value) {
  if (is_backward(args)) return;
  static_cast<E*>(args.logprobs)[row] = value;
  static_cast<E*>(args.entropy)[row] = value;
  if (args.softmax_stats != nullptr) {
    static_cast<E*>(args.softmax_stats)[row] = value;
    static_cast<E*>(args.softmax_stats)[args.logits.rows + row] = value;
  }
}

// Returns d loss / d logprob of one token, by the formula for log-probabilities, in the loss's
// compute dtype.
template <typename C>
IPO_HOST_DEVICE double grad_logprob(const LogitsArgs& args, int64_t row, C logprob) {
  const IpoLossArgs& loss = args.loss;
#define IPO_EXT_LOAD_REQUIRED(member, tensor) load_token<C>(loss.tensor, row, 0),
#define IPO_EXT_LOAD_OPTIONAL(member, tensor, absent) load_token<C>(loss.tensor, row, absent),
  const math::Token<C> token = {
      logprob, IPO_EXT_TOKEN_INPUTS(IPO_EXT_LOAD_REQUIRED, IPO_EXT_LOAD_OPTIONAL) true, C(0)};
#undef IPO_EXT_LOAD_OPTIONAL
#undef IPO_EXT_LOAD_REQUIRED
  const math::LossParams<C> params = params_for<C>(loss);
  return params.rules() == math::Rules::kDefault
             ? math::token_loss<math::Rules::kDefault>(token, params).gradient
             : math::token_loss<math::Rules::kAny>(token, params).gradient;
}

// Returns the gradients that the backward pass brings to an active row, known before it is read.
template <typename E>
IPO_HOST_DEVICE math::RowGrads<E> upstream_grads(const LogitsArgs& args, int64_t row) {
  return {load_token<E>(args.grad_logprobs, row, 0), load_token<E>(args.grad_entropy, row, 0)};
}

// Returns what an active row's maximum and sums say of its token.
template <typename E>
IPO_HOST_DEVICE math::RowResult<E> result_of_row(const LogitsArgs& args, int64_t row,
                                                 const math::RowSums& sums, E row_max,
                                                 E label_capped) {
  const double label_x =
      (static_cast<double>(label_capped) - row_max) / temperature_of<E>(args, row);
  return math::row_result<E>(sums, label_x);
}

template <typename E>
IPO_HOST_DEVICE void store_results(const LogitsArgs& args, int64_t row,
                                   const math::RowResult<E>& result, const math::RowSums& sums,
                                   E row_max) {
  static_cast<E*>(args.logprobs)[row] = result.logprob;
  static_cast<E*>(args.entropy)[row] = result.entropy;
  if (args.softmax_stats != nullptr) {
    static_cast<E*>(args.softmax_stats)[row] = row_max;
    static_cast<E*>(args.softmax_stats)[args.logits.rows + row] = static_cast<E>(sums.sum_exp);
  }
}

// Returns the gradients that the loss brings to an active row; 0 without a loss.
template <typename E>
IPO_HOST_DEVICE math::RowGrads<E> loss_grads(const LogitsArgs& args, int64_t row, E logprob) {
  if (!has_loss(args)) return {0, 0};
  return {static_cast<E>(args.loss.compute_dtype == DType::kFloat64
                             ? grad_logprob<double>(args, row, logprob)
                             : grad_logprob<float>(args, row, logprob)),
          0};
}

// Returns the gradients over a power of two of the row's own, which goes to row_scales, where an
// fp16 gradient is stored so: weights, advantages and normalizers of any size neither overflow nor
// underflow before a caller's loss scale has been applied.
template <typename Gradient, typename E>
IPO_HOST_DEVICE math::RowGrads<E> over_scale(const LogitsArgs& args, int64_t row, bool stores_scale,
                                             const math::RowGrads<E>& grads, E entropy,
                                             E inverse_temperature) {
  if constexpr (std::is_same_v<Gradient, Float16>) {
    if (args.row_scales == nullptr) return grads;
    const math::RowScale scale =
        math::fp16_scale(math::derivative_bound(grads, entropy, inverse_temperature));
    if (stores_scale) args.row_scales[row] = scale.scale;
    return {grads.logprob * scale.inverse, grads.entropy * scale.inverse};
  } else {
    return grads;
  }
}

// Stores the scale of a row whose gradient is 0, or NaN.
template <typename Gradient>
IPO_HOST_DEVICE void fill_scale(const LogitsArgs& args, int64_t row) {
  if constexpr (std::is_same_v<Gradient, Float16>) {
    if (args.row_scales != nullptr) args.row_scales[row] = math::fp16_scale(0).scale;
  }
}

// Finishes an active row from its sums: stores the results, returns what its gradient is made of.
template <typename Gradient, typename E>
IPO_HOST_DEVICE math::RowDerivative<E> finish_row(const LogitsArgs& args, int64_t row,
                                                  const math::RowSums& sums, E row_max,
                                                  E label_capped) {
  const math::RowResult<E> result = result_of_row<E>(args, row, sums, row_max, label_capped);
  store_results(args, row, result, sums, row_max);
  const E inverse_temperature = scale_of<E>(args, row).inverse_temperature;
  const math::RowGrads<E> grads = over_scale<Gradient>(
      args, row, true, loss_grads(args, row, result.logprob), result.entropy, inverse_temperature);
  return math::row_derivative<E>(grads, sums.sum_exp, result.entropy, inverse_temperature);
}

// Returns what an active row's gradient is made of in the backward pass, from what the forward pass
// has saved.
template <typename Gradient, typename E>
IPO_HOST_DEVICE math::RowDerivative<E> restore_row(const LogitsArgs& args, int64_t row,
                                                   bool stores_scale,
                                                   const math::RowGrads<E>& grads) {
  const E entropy = static_cast<const E*>(args.entropy)[row];
  const E inverse_temperature = scale_of<E>(args, row).inverse_temperature;
  return math::row_derivative<E>(
      over_scale<Gradient>(args, row, stores_scale, grads, entropy, inverse_temperature),
      static_cast<const E*>(args.softmax_stats)[args.logits.rows + row], entropy,
      inverse_temperature);
}

template <typename E>
IPO_HOST_DEVICE E saved_row_max(const LogitsArgs& args, int64_t row) {
  return static_cast<const E*>(args.softmax_stats)[row];
}

namespace cpu {

// The caller has checked every active row's label and temperature.
void logits(const LogitsArgs& args, const ParallelFor& parallel_for);

}  // namespace cpu

namespace cuda {

// The ways in which rows of logits go through the kernels.
enum class RowPath : int32_t {
  kResident,   // a cluster of blocks for each row, which keeps it on chip between the passes
  kPipelined,  // a cluster for several rows, each of which is copied while the last is worked on
  kSplit,      // few rows: many blocks for each reduce it, a second launch writes its gradient
  kStreamed,   // the backward pass, which knows the rows' sums: blocks that keep nothing
};

// How a launch walks the rows, made once for each call. Vectors are 16 bytes of neighbouring
// columns, which a thread loads at once.
struct LaunchPlan {
  // What kernels read.
  int vectors = 0;           // of a thread
  int shared_vectors = 0;    // of these, those that shared memory has room for
  int splits = 0;            // kSplit: blocks that reduce a row
  int stream_splits = 1;     // kSplit, kStreamed: blocks that write the gradient of a row
  int stream_vectors = 0;    // of a thread of those
  int rows_per_cluster = 0;  // kPipelined

  // What launches read.
  RowPath path = RowPath::kResident;
  int cluster_blocks = 1;       // blocks of a row
  int threads = 0;              // of a block
  int64_t shared_bytes = 0;     // of a block, but for the blocks that stream
  int device_shared_bytes = 0;  // that a block may ask for
  int64_t workspace_bytes = 0;  // what args.workspace must hold
};

// Fills `plan` for the current device. Returns null, or CUDA's words for what failed.
const char* make_plan(const LogitsArgs& args, LaunchPlan& plan);

// find_faults fills *args.fault, which is not 0 for a contract fault: a label or a temperature of
// an active row, more active rows than args.max_active, the loss's cu_seqlens or normalizer. It
// reads no logits. Under a fault logits() makes every output NaN. Each makes at most two launches
// on `stream` without synchronising with the host, and returns null, or CUDA's words for what
// failed.
const char* find_faults(const LogitsArgs& args, CUstream_st* stream);
const char* logits(const LogitsArgs& args, const LaunchPlan& plan, CUstream_st* stream);

}  // namespace cuda
}  // namespace ipo_ext
