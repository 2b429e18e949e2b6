// The operators from logits: from a tensor of logits to the kernels' matrix, and the loss of the
// log-probabilities that come out. The loss from hidden states runs the same steps (faults, rows,
// loss; where sequences are judged faults, log-probabilities, loss, gradient) one by one, those
// over rows for each chunk.
#pragma once

#include <tuple>
#include <utility>

#include "ops/ipo_loss.h"
#include "ops/matrix.h"
#include "ops/score_centering.h"

namespace ipo_ext {

// CPU only: reads the values. The word "labels" at the start tells Python to raise IndexError.
inline void check_rows(const LogitsArgs& args) {
  int64_t active = 0;
  for (int64_t row = 0; row < args.logits.rows; ++row) {
    if (!row_is_active(args, row)) continue;
    ++active;
    IPO_EXT_CHECK(label_is_valid(args, row), "labels: expected a token in [0, ",
                  args.logits.columns, ") wherever a row is active, got ", label_of(args, row),
                  " at row ", row);
    IPO_EXT_CHECK(temperature_is_valid(args, row),
                  "temperature: expected a finite number > 0 wherever a row is active, got ",
                  given_temperature(args, row), " at row ", row);
  }
  IPO_EXT_CHECK(active <= args.max_active, "num_active: expected at least the ", active,
                " tokens that loss_mask has, got ", args.max_active);
}

// The answer of an earlier call of find_faults.
inline int32_t* fault_flag(const Tensor& fault, const Tensor& like) {
  IPO_EXT_CHECK(
      fault.scalar_type() == ScalarType::Int && fault.numel() == 1 && same_device(fault, like),
      "fault: expected what find_faults has returned");
  return static_cast<int32_t*>(fault.mutable_data_ptr());
}

// Labels and temperatures of rows: all that a call needs to look for faults.
class __attribute__((visibility("hidden"))) RowsCall {
 public:
  RowsCall(const Tensor& labels, int64_t columns, const std::optional<Tensor>& temperature)
      : labels_(as_contiguous(labels, "labels")) {
    args.logits.rows = labels.numel();
    args.logits.columns = columns;
    args.labels = labels_.const_data_ptr();
    args.label_dtype = dtype_of(labels_, "labels");
    IPO_EXT_CHECK(!is_floating(args.label_dtype), "labels: expected dtype int32 or int64");
    if (temperature.has_value() && temperature->dim() > 0) {
      temperatures_ = PerToken(*temperature, labels_, "temperature");
      args.temperatures = temperatures_->input();
    } else {
      args.temperature = scalar_input(temperature, labels_, "temperature");
    }
  }

  // Raises on the CPU, else leaves the answer in `fault`, on the device.
  template <typename Backend>
  void find_faults() {
    fault = empty({1}, ScalarType::Int, labels_);
    args.fault = static_cast<int32_t*>(fault.mutable_data_ptr());
    if constexpr (Backend::kFaultsRaise) {
      check_rows(args);
      *args.fault = 0;
    } else {
      Backend::find_faults(args, labels_);
    }
  }

  LogitsArgs args = {};
  Tensor fault;

  // Where all that a call makes lies.
  const Tensor& on() const { return labels_; }

 protected:
  Tensor labels_;

 private:
  std::optional<PerToken> temperatures_;
};

// One call of the kernels over logits: checks the inputs that all operators share and owns what
// they need.
class __attribute__((visibility("hidden"))) LogitsCall : public RowsCall {
 public:
  LogitsCall(const Tensor& logits, const Tensor& labels, const LogitScaling& scaling)
      : RowsCall(labels, logits.size(-1), scaling.temperature),
        on_(logits),
        logits_(logits, "logits") {
    args.logits = logits_.matrix();
    args.compute_dtype = is_float64(logits) ? DType::kFloat64 : DType::kFloat32;
    args.softcap = scaling.softcap;
    IPO_EXT_CHECK(labels.numel() == args.logits.rows && same_device(labels, logits),
                  "labels: expected ", args.logits.rows, " tokens on the device of logits, got ",
                  labels.numel());
  }

  // [rows] or [count, rows] in the compute dtype, of which the kernel knows the address.
  Tensor per_token(void*& data) const { return new_output(sizes_of(labels_), data); }
  Tensor per_token(int64_t count, void*& data) const {
    return new_output({count, args.logits.rows}, data);
  }

  // What an operator from logits has made before: [rows] or [2, rows], in the compute dtype.
  void* saved(const Tensor& tensor, int64_t count, const char* name) {
    IPO_EXT_CHECK(
        tensor.scalar_type() == compute() && tensor.numel() == count && same_device(tensor, on_),
        name, ": expected ", count, " elements in the compute dtype, on the device of logits");
    kept_.push_back(as_contiguous(tensor, name));
    return const_cast<void*>(kept_.back().const_data_ptr());
  }

  Tensor new_gradient() {
    Tensor gradient = empty(sizes_of(on_), on_.scalar_type(), on_);
    args.gradient = contiguous_like(args.logits, gradient.mutable_data_ptr());
    return gradient;
  }

  void write_gradient_over_logits() {
    IPO_EXT_CHECK(!logits_.is_copy() && rows_are_apart(args.logits),
                  "logits: expected rows of adjacent elements that share no memory, so that the "
                  "gradient can be written over them");
    args.gradient = args.logits;
  }

  // Into a tensor of the same shape, fp16 or bf16 for fp32 logits; it may lie over them.
  void write_gradient_to(const Tensor& gradient) {
    const LogitsTensor matrix(gradient, "gradient");
    args.gradient = matrix.matrix();
    const DType dtype = args.gradient.dtype;
    const bool narrower = args.logits.dtype == DType::kFloat32 && dtype != DType::kFloat64;
    IPO_EXT_CHECK(!matrix.is_copy() && rows_are_apart(args.gradient) &&
                      args.gradient.rows == args.logits.rows &&
                      args.gradient.columns == args.logits.columns && same_device(gradient, on_),
                  "gradient: expected the shape and the device of logits, its rows apart");
    IPO_EXT_CHECK(dtype == args.logits.dtype || narrower,
                  "gradient: expected the dtype of logits, or fp16 or bf16 for fp32 logits");
  }

  // What the rows of an fp16 gradient are stored over: [rows], else without an element.
  Tensor new_row_scales() {
    const bool is_half = args.gradient.data != nullptr && args.gradient.dtype == DType::kFloat16;
    Tensor scales = empty({is_half ? args.logits.rows : 0}, ScalarType::Float, on_);
    if (is_half) args.row_scales = static_cast<float*>(scales.mutable_data_ptr());
    return scales;
  }

  void write_row_scales_to(const std::optional<Tensor>& scales) {
    if (!scales.has_value()) return;
    IPO_EXT_CHECK(args.gradient.dtype == DType::kFloat16 &&
                      scales->scalar_type() == ScalarType::Float && scales->is_contiguous() &&
                      scales->numel() == args.logits.rows && same_device(*scales, on_),
                  "row_scales: expected None, or for a float16 gradient ", args.logits.rows,
                  " contiguous float32 elements on the device of logits");
    args.row_scales = static_cast<float*>(scales->mutable_data_ptr());
  }

  // The rows become the tokens of a loss.
  void take_loss(IpoLossCall& loss) {
    args.loss = loss.args;
    args.active = loss.args.loss_mask;
    args.mode = LogitsMode::kLoss;
  }

  template <typename Backend>
  void run() {
    const auto plan = Backend::make_plan(args, on_);
    const Tensor workspace = empty({plan.workspace_bytes}, ScalarType::Byte, on_);
    args.workspace = workspace.mutable_data_ptr();
    Backend::logits(args, plan, on_);
  }

  // Reduces the rows and no more. Returns their RowStats, of each row in so many splits.
  template <typename Backend>
  Tensor run_partial(int64_t& splits) {
    args.mode = LogitsMode::kPartial;
    const auto plan = Backend::make_plan(args, on_);
    Tensor stats = empty({plan.workspace_bytes}, ScalarType::Byte, on_);
    args.workspace = stats.mutable_data_ptr();
    splits = plan.splits;
    Backend::logits(args, plan, on_);
    return stats;
  }

  LogitsCall(const LogitsCall&) = delete;

 private:
  ScalarType compute() const {
    return args.compute_dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  }
  Tensor new_output(std::vector<int64_t> sizes, void*& data) const {
    Tensor tensor = empty(std::move(sizes), compute(), on_);
    data = tensor.mutable_data_ptr();
    return tensor;
  }

  Tensor on_;
  LogitsTensor logits_;
  std::vector<Tensor> kept_;
};

// Rows that replay the sampler's support, and other ids than the label whose log-probabilities are
// wanted: what is done beside the pass over all rows, which knows neither. Without both, nothing.
class __attribute__((visibility("hidden"))) Replay {
 public:
  Replay(const RowsCall& rows, const std::optional<Tensor>& sampling_mask, bool with_entropy,
         const std::optional<Tensor>& candidates = std::nullopt)
      : on_(rows.on()), with_entropy_(with_entropy) {
    const int64_t count = rows.args.logits.rows;
    if (sampling_mask.has_value())
      take_ids(*sampling_mask, count, "sampling_mask", ids_, args_.ids, args_.width);
    if (candidates.has_value())
      take_ids(*candidates, count, "candidates", candidates_, args_.candidates,
               args_.num_candidates);
    if (!exists()) return;
    replayed_ = allocate({count}, ScalarType::Bool, args_.replays);
    others_ = allocate({count}, ScalarType::Bool, args_.others);
  }

  // Makes candidates of the support itself, where a row replays it.
  void want_logprobs_of_support() {
    candidates_ = ids_;
    args_.candidates = args_.ids;
    args_.num_candidates = args_.width;
    args_.only_replayed = true;
  }

  bool exists() const { return ids_.has_value() || candidates_.has_value(); }
  // [tokens], as find() leaves it; without an element where there is no sampling mask.
  Tensor replayed() const {
    return ids_.has_value() ? replayed_ : empty({0}, ScalarType::Bool, on_);
  }
  // [..., candidates] as the forward pass leaves them; without an element where there are none.
  Tensor new_candidate_logprobs(const LogitsArgs& rows) {
    args_.rows = rows;
    if (!candidates_.has_value()) return empty({0}, compute(), on_);
    return allocate(sizes_of(*candidates_), compute(), args_.candidate_logprobs);
  }
  void take_grad_candidates(const LogitsArgs& rows, const std::optional<Tensor>& grads) {
    args_.rows = rows;
    if (!candidates_.has_value()) return;
    IPO_EXT_CHECK(grads.has_value() && grads->scalar_type() == compute() &&
                      grads->numel() == candidates_->numel() && same_device(*grads, on_),
                  "grad_candidates: expected ", candidates_->numel(),
                  " elements in the compute dtype, on the device of logits");
    grad_candidates_ = as_contiguous(*grads, "grad_candidates");
    args_.grad_candidates = grad_candidates_.const_data_ptr();
  }

  // Decides which rows replay. Where it `checks` ids: raises on the CPU for one that breaks the
  // contract, else adds to what find_faults has left.
  template <typename Backend>
  void find(const LogitsArgs& rows, bool checks) {
    if (!exists()) return;
    args_.rows = rows;
    args_.checks = checks;
    if (is_backward(rows)) row_grads_ = allocate({rows.logits.rows}, compute(), args_.row_grads);
    Backend::find_support(args_, on_);
    if constexpr (Backend::kFaultsRaise) {
      if (checks && *rows.fault != 0) raise_fault();
    }
  }

  // Runs the forward pass over all rows, and reads S of those that replay.
  template <typename Backend>
  void run_forward(LogitsCall& rows, bool keeps) {
    const uint8_t* active = rows.args.active;
    if (exists() && !with_entropy_) rows.args.active = args_.others;
    rows.run<Backend>();
    rows.args.active = active;
    read<Backend>(rows.args, keeps);
  }

  // Runs the backward pass over all rows, and writes the gradient of those that replay on S, which
  // has been read. Where no gradient of the entropy flows, the pass only zeroes their rows.
  template <typename Backend>
  void run_backward(LogitsCall& rows) {
    const LogitsArgs given = rows.args;
    if (exists() && given.grad_entropy.data == nullptr) rows.args.active = args_.others;
    if (exists() && given.grad_entropy.data != nullptr)
      rows.args.grad_logprobs = {args_.row_grads, given.compute_dtype};
    rows.run<Backend>();
    rows.args = given;
    if (!exists()) return;
    args_.rows = given;
    Backend::write_support(args_, on_);
  }

  // `keeps` what the gradient will be made of, before it is written over the logits.
  template <typename Backend>
  void read(const LogitsArgs& rows, bool keeps) {
    if (!exists()) return;
    args_.rows = rows;
    if (keeps) {
      kept_ = allocate({rows.logits.rows, args_.width}, compute(), args_.kept);
      kept_candidates_ =
          allocate({rows.logits.rows, args_.num_candidates + 1}, compute(), args_.kept_candidates);
      stats_ = allocate({2, rows.logits.rows}, compute(), args_.stats);
    }
    Backend::read_support(args_, on_);
  }

 private:
  void take_ids(const Tensor& ids, int64_t rows, const char* name, std::optional<Tensor>& held,
                const int32_t*& data, int64_t& width) {
    IPO_EXT_CHECK(ids.scalar_type() == ScalarType::Int && ids.dim() > 0 &&
                      ids.numel() == rows * ids.size(-1) && same_device(ids, on_),
                  name, ": expected int32 [..., ids] of ", rows, " tokens on the device of labels");
    held = as_contiguous(ids, name);
    data = static_cast<const int32_t*>(held->const_data_ptr());
    width = held->size(-1);
  }
  ScalarType compute() const {
    return args_.rows.compute_dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  }
  template <typename T>
  Tensor allocate(std::vector<int64_t> sizes, ScalarType dtype, T*& data) const {
    Tensor tensor = empty(std::move(sizes), dtype, on_);
    data = static_cast<T*>(tensor.mutable_data_ptr());
    return tensor;
  }

  void raise_fault() const {
    const int64_t columns = args_.rows.logits.columns;
    for (int64_t row = 0; row < args_.rows.logits.rows; ++row) {
      if (!row_is_active(args_.rows, row)) continue;
      const int32_t *ids = ids_of(args_, row), *candidates = candidates_of(args_, row);
      for (int64_t i = 0; i < args_.width; ++i) {
        IPO_EXT_CHECK(id_is_valid(args_, ids, i), "sampling_mask: expected tokens in [0, ", columns,
                      "), none of them twice, or -1, wherever a row is active, got ", ids[i],
                      " at row ", row, ", place ", i);
      }
      for (int64_t i = 0; i < args_.num_candidates; ++i) {
        IPO_EXT_CHECK(candidate_is_valid(args_, candidates[i]),
                      "candidates: expected tokens in [0, ", columns,
                      ") or -1 wherever a row is active, got ", candidates[i], " at row ", row,
                      ", place ", i);
      }
    }
  }

  SupportArgs args_ = {};
  Tensor on_;
  bool with_entropy_;
  std::optional<Tensor> ids_, candidates_;
  Tensor replayed_, others_, row_grads_, grad_candidates_, kept_, kept_candidates_, stats_;
};

// All log-probabilities before any gradient: for a verdict on a sequence, which needs them, and for
// rows whose log-probability is not the row's alone. Then come the loss and its derivatives by
// them, then the gradient, by another pass over the logits.
template <typename Backend>
void run_in_two_passes(LogitsCall& rows, IpoLossCall& loss, Replay& replay,
                       CenteringCall* centering = nullptr) {
  const LogitsMatrix gradient = std::exchange(rows.args.gradient, {});
  const bool with_gradient = gradient.data != nullptr;
  rows.args.mode = LogitsMode::kForward;
  std::optional<Tensor> softmax_stats;
  if (with_gradient) softmax_stats = rows.per_token(2, rows.args.softmax_stats);
  replay.run_forward<Backend>(rows, with_gradient);
  loss.run<Backend>();
  if (centering != nullptr) centering->run<Backend>();
  if (!with_gradient) return;
  rows.args.mode = LogitsMode::kBackward;
  rows.args.gradient = gradient;
  rows.args.grad_logprobs = {loss.args.gradient, loss.args.compute_dtype};
  if (centering != nullptr) replay.take_grad_candidates(rows.args, centering->gradient);
  replay.run_backward<Backend>(rows);
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_of_logits(
    LogitsCall& rows, const LogitScaling& scaling, const LossInputs& inputs,
    const LossSettings& settings, const std::optional<Tensor>& inference_mask_logprobs) {
  const Tensor logprobs = rows.per_token(rows.args.logprobs);
  const Tensor entropy = rows.per_token(rows.args.entropy);
  const Tensor row_scales = rows.new_row_scales();
  Replay replay(rows, scaling.sampling_mask, scaling.with_entropy);
  const bool in_two_passes = settings.params.judges_sequences || replay.exists();
  const bool needs_grad_logprobs = in_two_passes && rows.args.gradient.data != nullptr;
  const auto measured = scaling.with_entropy ? std::optional(entropy) : std::nullopt;
  IpoLossCall loss(logprobs, inputs, measured, settings, needs_grad_logprobs);
  if (replay.exists()) loss.measure_replay(replay.replayed());
  std::optional<CenteringCall> centering;
  if (inference_mask_logprobs.has_value()) {
    IPO_EXT_CHECK(replay.exists(), "sampling_mask: expected ids with inference_mask_logprobs");
    replay.want_logprobs_of_support();
    centering.emplace(loss, replay.new_candidate_logprobs(rows.args), *inference_mask_logprobs,
                      needs_grad_logprobs);
    centering->take_replayed(replay.replayed());
  }
  loss.check_values<Backend>();
  rows.take_loss(loss);
  rows.find_faults<Backend>();
  replay.find<Backend>(rows.args, true);
  loss.args.fault = rows.args.fault;
  if (centering.has_value()) centering->add_to(loss);
  if (in_two_passes) {
    run_in_two_passes<Backend>(rows, loss, replay, centering.has_value() ? &*centering : nullptr);
  } else {
    rows.run<Backend>();
    loss.run<Backend>();
  }
  return {loss.loss, logprobs, entropy, loss.means, loss.sums, loss.extremes, row_scales};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss_from_logits(
    const Tensor& logits, const Tensor& labels, const LogitScaling& scaling,
    const LossInputs& inputs, const LossSettings& settings,
    const std::optional<Tensor>& inference_mask_logprobs, bool with_gradient) {
  LogitsCall rows(logits, labels, scaling);
  const Tensor gradient =
      with_gradient ? rows.new_gradient() : empty({0}, logits.scalar_type(), logits);
  const auto [loss, logprobs, entropy, means, sums, extremes, row_scales] =
      loss_of_logits<Backend>(rows, scaling, inputs, settings, inference_mask_logprobs);
  return {loss, gradient, logprobs, entropy, means, sums, extremes, row_scales};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss_from_logits_(
    const Tensor& logits, const Tensor& labels, const LogitScaling& scaling,
    const LossInputs& inputs, const LossSettings& settings,
    const std::optional<Tensor>& inference_mask_logprobs) {
  const LogitScaling kept = apart_from(logits, scaling);
  LogitsCall rows(logits, apart_from(logits, labels), kept);
  rows.write_gradient_over_logits();
  return loss_of_logits<Backend>(rows, kept, apart_from(logits, inputs), settings,
                                 apart_from(logits, inference_mask_logprobs));
}

template <typename Backend>
std::tuple<Tensor, Tensor> find_faults(
    const Tensor& labels, const std::optional<Tensor>& candidates,
    const std::optional<Tensor>& temperature, const std::optional<Tensor>& sampling_mask,
    const std::optional<Tensor>& loss_mask, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& normalizer, int64_t columns, int64_t max_active) {
  RowsCall rows(labels, columns, temperature);
  rows.args.max_active = max_active;
  std::optional<IpoLossCall> loss;
  if (loss_mask.has_value()) {
    loss.emplace(labels, *loss_mask, cu_seqlens, normalizer);
    loss->check_values<Backend>();
    rows.args.loss = loss->args;
    rows.args.active = loss->args.loss_mask;
    rows.args.mode = LogitsMode::kLoss;
  }
  rows.find_faults<Backend>();
  Replay replay(rows, sampling_mask, true, candidates);
  replay.find<Backend>(rows.args, true);
  return {rows.fault, replay.replayed()};
}

template <typename Backend>
std::tuple<Tensor, Tensor> chunk_logprobs_and_gradient(
    const Tensor& logits, const Tensor& labels, const LogitScaling& scaling,
    const LossInputs& inputs, const LossSettings& settings, const Tensor& fault,
    const std::optional<Tensor>& gradient, const std::optional<Tensor>& row_scales) {
  IPO_EXT_CHECK(!inputs.cu_seqlens.has_value(), "cu_seqlens: expected None, got a tensor");
  IPO_EXT_CHECK(!settings.params.judges_sequences, "judges_sequences: expected False, got True");
  LogitsCall rows(logits, labels, scaling);
  const Tensor logprobs = rows.per_token(rows.args.logprobs);
  const Tensor entropy = rows.per_token(rows.args.entropy);
  if (gradient.has_value()) rows.write_gradient_to(*gradient);
  rows.write_row_scales_to(row_scales);
  rows.args.fault = fault_flag(fault, logits);
  Replay replay(rows, scaling.sampling_mask, scaling.with_entropy);
  IpoLossCall loss(logprobs, inputs, std::nullopt, settings,
                   replay.exists() && gradient.has_value());
  rows.take_loss(loss);
  if (replay.exists()) {
    replay.find<Backend>(rows.args, false);
    run_in_two_passes<Backend>(rows, loss, replay);
  } else {
    rows.run<Backend>();
  }
  return {logprobs, entropy};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_metrics(
    const Tensor& logprobs, const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& replayed, const LossInputs& inputs, const LossSettings& settings,
    const Tensor& fault, bool with_gradient) {
  IpoLossCall loss(logprobs, inputs, entropy, settings, with_gradient);
  if (replayed.has_value()) loss.measure_replay(*replayed);
  loss.args.fault = fault_flag(fault, logprobs);
  loss.run<Backend>();
  return {loss.loss, loss.gradient, loss.means, loss.sums, loss.extremes};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_rows(LogitsCall& rows, Replay& replay,
                                                        bool checks) {
  const Tensor logprobs = rows.per_token(rows.args.logprobs);
  const Tensor entropy = rows.per_token(rows.args.entropy);
  const Tensor softmax_stats = rows.per_token(2, rows.args.softmax_stats);
  const Tensor candidate_logprobs = replay.new_candidate_logprobs(rows.args);
  replay.find<Backend>(rows.args, checks);
  replay.run_forward<Backend>(rows, false);
  return {logprobs, entropy, softmax_stats, candidate_logprobs};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits,
                                                          const Tensor& labels,
                                                          const LogitScaling& scaling,
                                                          const std::optional<Tensor>& candidates) {
  LogitsCall rows(logits, labels, scaling);
  rows.find_faults<Backend>();
  Replay replay(rows, scaling.sampling_mask, scaling.with_entropy, candidates);
  return forward_rows<Backend>(rows, replay, true);
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_logprobs(const Tensor& logits,
                                                          const Tensor& labels,
                                                          const LogitScaling& scaling,
                                                          const std::optional<Tensor>& candidates,
                                                          const Tensor& fault) {
  LogitsCall rows(logits, labels, scaling);
  rows.args.fault = fault_flag(fault, logits);
  Replay replay(rows, scaling.sampling_mask, scaling.with_entropy, candidates);
  return forward_rows<Backend>(rows, replay, false);
}

template <typename Backend>
void backward_rows(LogitsCall& rows, Replay& replay, bool checks, const Tensor& entropy,
                   const Tensor& softmax_stats, const Tensor& grad_logprobs,
                   const Tensor& grad_entropy, const std::optional<Tensor>& grad_candidates) {
  const int64_t count = rows.args.logits.rows;
  rows.args.mode = LogitsMode::kBackward;
  rows.args.entropy = rows.saved(entropy, count, "entropy");
  rows.args.softmax_stats = rows.saved(softmax_stats, 2 * count, "softmax_stats");
  const DType compute = rows.args.compute_dtype;
  rows.args.grad_logprobs = {rows.saved(grad_logprobs, count, "grad_logprobs"), compute};
  rows.args.grad_entropy = {rows.saved(grad_entropy, count, "grad_entropy"), compute};
  replay.take_grad_candidates(rows.args, grad_candidates);
  replay.find<Backend>(rows.args, checks);
  replay.read<Backend>(rows.args, true);
  replay.run_backward<Backend>(rows);
}

template <typename Backend>
Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels,
                               const LogitScaling& scaling, const std::optional<Tensor>& candidates,
                               const Tensor& entropy, const Tensor& softmax_stats,
                               const Tensor& grad_logprobs, const Tensor& grad_entropy,
                               const std::optional<Tensor>& grad_candidates) {
  LogitsCall rows(logits, labels, scaling);
  const Tensor gradient = rows.new_gradient();
  rows.find_faults<Backend>();
  Replay replay(rows, scaling.sampling_mask, scaling.with_entropy, candidates);
  backward_rows<Backend>(rows, replay, true, entropy, softmax_stats, grad_logprobs, grad_entropy,
                         grad_candidates);
  return gradient;
}

template <typename Backend>
void chunk_logprobs_backward(const Tensor& logits, const Tensor& labels,
                             const LogitScaling& scaling, const std::optional<Tensor>& candidates,
                             const Tensor& entropy, const Tensor& softmax_stats,
                             const Tensor& grad_logprobs, const Tensor& grad_entropy,
                             const std::optional<Tensor>& grad_candidates, const Tensor& fault,
                             const Tensor& gradient, const std::optional<Tensor>& row_scales) {
  LogitsCall rows(logits, labels, scaling);
  rows.write_gradient_to(gradient);
  rows.write_row_scales_to(row_scales);
  rows.args.fault = fault_flag(fault, logits);
  Replay replay(rows, scaling.sampling_mask, scaling.with_entropy, candidates);
  backward_rows<Backend>(rows, replay, false, entropy, softmax_stats, grad_logprobs, grad_entropy,
                         grad_candidates);
}

}  // namespace ipo_ext
