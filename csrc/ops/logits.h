// The operators from logits: from a tensor of logits to the kernels' matrix, and the loss of the
// log-probabilities that come out. The loss from hidden states runs the same steps (faults, rows,
// loss; where sequences are judged faults, log-probabilities, loss, gradient) one by one, those
// over rows for each chunk.
#pragma once

#include <tuple>
#include <utility>

#include "ops/ipo_loss.h"
#include "ops/matrix.h"

namespace ipo_ext {

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

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

// A verdict on a sequence needs all of its log-probabilities before any gradient: they come first,
// then the loss and its derivatives by them, then the gradient, by another pass over the logits.
template <typename Backend>
void run_in_two_passes(LogitsCall& rows, IpoLossCall& loss) {
  const LogitsMatrix gradient = std::exchange(rows.args.gradient, {});
  rows.args.mode = LogitsMode::kForward;
  std::optional<Tensor> softmax_stats;
  if (gradient.data != nullptr) softmax_stats = rows.per_token(2, rows.args.softmax_stats);
  rows.run<Backend>();
  loss.run<Backend>();
  if (gradient.data == nullptr) return;
  rows.args.mode = LogitsMode::kBackward;
  rows.args.gradient = gradient;
  rows.args.grad_logprobs = {loss.args.gradient, loss.args.compute_dtype};
  rows.run<Backend>();
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_of_logits(
    LogitsCall& rows, const LossInputs& inputs, const LossSettings& settings) {
  const Tensor logprobs = rows.per_token(rows.args.logprobs);
  const Tensor entropy = rows.per_token(rows.args.entropy);
  const Tensor row_scales = rows.new_row_scales();
  const bool needs_grad_logprobs =
      settings.params.judges_sequences && rows.args.gradient.data != nullptr;
  IpoLossCall loss(logprobs, inputs, entropy, settings, needs_grad_logprobs);
  loss.check_values<Backend>();
  rows.take_loss(loss);
  rows.find_faults<Backend>();
  loss.args.fault = rows.args.fault;
  if (settings.params.judges_sequences) {
    run_in_two_passes<Backend>(rows, loss);
  } else {
    rows.run<Backend>();
    loss.run<Backend>();
  }
  return {loss.loss, logprobs, entropy, loss.means, loss.sums, loss.extremes, row_scales};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss_from_logits(
    const Tensor& logits, const Tensor& labels, const LogitScaling& scaling,
    const LossInputs& inputs, const LossSettings& settings, bool with_gradient) {
  LogitsCall rows(logits, labels, scaling);
  const Tensor gradient =
      with_gradient ? rows.new_gradient() : empty({0}, logits.scalar_type(), logits);
  const auto [loss, logprobs, entropy, means, sums, extremes, row_scales] =
      loss_of_logits<Backend>(rows, inputs, settings);
  return {loss, gradient, logprobs, entropy, means, sums, extremes, row_scales};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss_from_logits_(
    const Tensor& logits, const Tensor& labels, const LogitScaling& scaling,
    const LossInputs& inputs, const LossSettings& settings) {
  LogitsCall rows(logits, apart_from(logits, labels),
                  {apart_from(logits, scaling.temperature), scaling.softcap});
  rows.write_gradient_over_logits();
  return loss_of_logits<Backend>(rows, apart_from(logits, inputs), settings);
}

template <typename Backend>
Tensor find_faults(const Tensor& labels, const std::optional<Tensor>& temperature,
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
  return rows.fault;
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
  IpoLossCall loss(logprobs, inputs, std::nullopt, settings, false);
  rows.take_loss(loss);
  rows.run<Backend>();
  return {logprobs, entropy};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_metrics(
    const Tensor& logprobs, const Tensor& entropy, const LossInputs& inputs,
    const LossSettings& settings, const Tensor& fault, bool with_gradient) {
  IpoLossCall loss(logprobs, inputs, entropy, settings, with_gradient);
  loss.args.fault = fault_flag(fault, logprobs);
  loss.run<Backend>();
  return {loss.loss, loss.gradient, loss.means, loss.sums, loss.extremes};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> forward_rows(LogitsCall& rows) {
  const Tensor logprobs = rows.per_token(rows.args.logprobs);
  const Tensor entropy = rows.per_token(rows.args.entropy);
  const Tensor softmax_stats = rows.per_token(2, rows.args.softmax_stats);
  rows.run<Backend>();
  return {logprobs, entropy, softmax_stats};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& labels,
                                                  const LogitScaling& scaling) {
  LogitsCall rows(logits, labels, scaling);
  rows.find_faults<Backend>();
  return forward_rows<Backend>(rows);
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> chunk_logprobs(const Tensor& logits, const Tensor& labels,
                                                  const LogitScaling& scaling,
                                                  const Tensor& fault) {
  LogitsCall rows(logits, labels, scaling);
  rows.args.fault = fault_flag(fault, logits);
  return forward_rows<Backend>(rows);
}

template <typename Backend>
void backward_rows(LogitsCall& rows, const Tensor& entropy, const Tensor& softmax_stats,
                   const Tensor& grad_logprobs, const Tensor& grad_entropy) {
  const int64_t count = rows.args.logits.rows;
  rows.args.mode = LogitsMode::kBackward;
  rows.args.entropy = rows.saved(entropy, count, "entropy");
  rows.args.softmax_stats = rows.saved(softmax_stats, 2 * count, "softmax_stats");
  const DType compute = rows.args.compute_dtype;
  rows.args.grad_logprobs = {rows.saved(grad_logprobs, count, "grad_logprobs"), compute};
  rows.args.grad_entropy = {rows.saved(grad_entropy, count, "grad_entropy"), compute};
  rows.run<Backend>();
}

template <typename Backend>
Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels,
                               const LogitScaling& scaling, const Tensor& entropy,
                               const Tensor& softmax_stats, const Tensor& grad_logprobs,
                               const Tensor& grad_entropy) {
  LogitsCall rows(logits, labels, scaling);
  const Tensor gradient = rows.new_gradient();
  rows.find_faults<Backend>();
  backward_rows<Backend>(rows, entropy, softmax_stats, grad_logprobs, grad_entropy);
  return gradient;
}

template <typename Backend>
void chunk_logprobs_backward(const Tensor& logits, const Tensor& labels,
                             const LogitScaling& scaling, const Tensor& entropy,
                             const Tensor& softmax_stats, const Tensor& grad_logprobs,
                             const Tensor& grad_entropy, const Tensor& fault,
                             const Tensor& gradient, const std::optional<Tensor>& row_scales) {
  LogitsCall rows(logits, labels, scaling);
  rows.write_gradient_to(gradient);
  rows.write_row_scales_to(row_scales);
  rows.args.fault = fault_flag(fault, logits);
  backward_rows<Backend>(rows, entropy, softmax_stats, grad_logprobs, grad_entropy);
}

}  // namespace ipo_ext
