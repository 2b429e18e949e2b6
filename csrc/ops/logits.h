// Tier 2's operators: from a tensor of logits to the kernels' matrix, and tier 1's call on the
// log-probabilities that come out.
#pragma once

#include <tuple>

#include "ops/ipo_loss.h"

namespace ipo_ext {

inline constexpr const char* kIpoLossFromLogitsSchema =
    "ipo_loss_from_logits(Tensor logits, Tensor labels, Tensor inference_logprobs, Tensor "
    "advantages, Tensor loss_mask, Tensor? temperature, float softcap, "
    "Tensor? teacher_logprobs, Tensor? loss_weights, Tensor? cu_seqlens, Tensor? normalizer, "
    "float log_low, float log_high, float adv_tau, float kl_tau, float teacher_tau, bool "
    "with_gradient) "
    "-> (Tensor loss, Tensor gradient, Tensor logprobs, Tensor entropy, Tensor means, Tensor sums, "
    "Tensor extremes)";

inline constexpr const char* kTokenLogprobsSchema =
    "token_logprobs(Tensor logits, Tensor labels, Tensor? temperature, float softcap) "
    "-> (Tensor logprobs, Tensor entropy, Tensor softmax)";

inline constexpr const char* kTokenLogprobsBackwardSchema =
    "token_logprobs_backward(Tensor logits, Tensor labels, Tensor? temperature, float softcap, "
    "Tensor entropy, Tensor softmax, Tensor grad_logprobs, Tensor grad_entropy) -> Tensor";

inline constexpr const char* kScaleSchema = "scale_(Tensor(a!) gradient, Tensor factor) -> ()";

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The logits as rows of adjacent columns at no more than two strides, without a copy where their
// layout allows it; holds the copy where it does not.
class __attribute__((visibility("hidden"))) LogitsTensor {
 public:
  explicit LogitsTensor(const Tensor& tensor) : tensor_(tensor) {
    IPO_EXT_CHECK(tensor.dim() > 0, "logits: expected shape [..., vocabulary], got a 0-dim tensor");
    if (!describe()) {
      tensor_ = torch::stable::contiguous(tensor_);
      describe();
    }
    matrix_.data = const_cast<void*>(tensor_.const_data_ptr());
    matrix_.dtype = dtype_of(tensor_, "logits");
    IPO_EXT_CHECK(is_floating(matrix_.dtype), "logits: expected a floating dtype");
  }
  const LogitsMatrix& matrix() const { return matrix_; }

 private:
  // Folds the dimensions before the last, from the inside: first into rows of a block, then, from
  // where the strides stop matching, into blocks. False if that does not fit the layout.
  bool describe() {
    const int64_t last = tensor_.dim() - 1;
    matrix_.columns = tensor_.size(last);
    if (tensor_.stride(last) != 1 && matrix_.columns > 1) return false;
    int64_t blocks = 1;
    matrix_.block_rows = 1;
    matrix_.row_stride = matrix_.block_stride = 0;
    for (int64_t dim = last - 1; dim >= 0; --dim) {
      const int64_t size = tensor_.size(dim), stride = tensor_.stride(dim);
      if (size == 1) continue;
      if (blocks == 1 &&
          (matrix_.block_rows == 1 || stride == matrix_.row_stride * matrix_.block_rows)) {
        if (matrix_.block_rows == 1) matrix_.row_stride = stride;
        matrix_.block_rows *= size;
      } else if (blocks == 1 || stride == matrix_.block_stride * blocks) {
        if (blocks == 1) matrix_.block_stride = stride;
        blocks *= size;
      } else {
        return false;
      }
    }
    matrix_.rows = matrix_.block_rows * blocks;
    if (matrix_.block_rows == 0) matrix_.block_rows = 1;
    return true;
  }

  Tensor tensor_;
  LogitsMatrix matrix_;
};

// The same matrix, contiguous: where the gradient goes.
inline LogitsMatrix contiguous_like(const LogitsMatrix& logits, void* data) {
  LogitsMatrix matrix = logits;
  matrix.data = data;
  matrix.block_rows = logits.rows > 0 ? logits.rows : 1;
  matrix.block_stride = 0;
  matrix.row_stride = logits.columns;
  return matrix;
}

// CPU only: reads the values. The word "labels" at the start tells Python to raise IndexError.
inline void check_rows(const LogitsArgs& args) {
  for (int64_t row = 0; row < args.logits.rows; ++row) {
    if (!row_is_active(args, row)) continue;
    IPO_EXT_CHECK(label_is_valid(args, row), "labels: expected a token in [0, ",
                  args.logits.columns, ") wherever a row is active, got ", label_of(args, row),
                  " at row ", row);
    IPO_EXT_CHECK(temperature_is_valid(args, row),
                  "temperature: expected a finite number > 0 wherever a row is active, got ",
                  temperature_of(args, row), " at row ", row);
  }
}

// One call of tier 2's kernels: checks the inputs that all operators share and owns what they need.
class __attribute__((visibility("hidden"))) LogitsCall {
 public:
  LogitsCall(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& temperature,
             double softcap)
      : on_(logits), logits_(logits), labels_(as_contiguous(labels)) {
    args.logits = logits_.matrix();
    args.compute_dtype = is_float64(logits) ? DType::kFloat64 : DType::kFloat32;
    args.labels = labels_.const_data_ptr();
    args.label_dtype = dtype_of(labels_, "labels");
    args.softcap = softcap;
    IPO_EXT_CHECK(!is_floating(args.label_dtype), "labels: expected dtype int32 or int64");
    IPO_EXT_CHECK(labels.numel() == args.logits.rows && same_device(labels, logits),
                  "labels: expected ", args.logits.rows, " tokens on the device of logits, got ",
                  labels.numel());
    if (temperature.has_value() && temperature->dim() > 0) {
      temperatures_ = PerToken(*temperature, labels_, "temperature");
      args.temperatures = temperatures_->input();
    } else {
      args.temperature = scalar_input(temperature, logits, "temperature");
    }
  }

  ScalarType compute() const {
    return args.compute_dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  }

  // A new tensor in the compute dtype, of which the kernel knows the address.
  Tensor per_token(void*& data) const {
    Tensor tensor = empty(sizes_of(labels_), compute(), on_);
    data = tensor.mutable_data_ptr();
    return tensor;
  }

  // An input that this tier's own operators have made: [rows] or [2, rows], in the compute dtype.
  void* saved(const Tensor& tensor, int64_t count, const char* name) {
    IPO_EXT_CHECK(
        tensor.scalar_type() == compute() && tensor.numel() == count && same_device(tensor, on_),
        name, ": expected ", count, " elements in the compute dtype, on the device of logits");
    kept_.push_back(as_contiguous(tensor));
    return const_cast<void*>(kept_.back().const_data_ptr());
  }

  Tensor new_gradient() {
    Tensor gradient = empty(sizes_of(on_), on_.scalar_type(), on_);
    args.gradient = contiguous_like(args.logits, gradient.mutable_data_ptr());
    return gradient;
  }

  template <typename Backend>
  void run() {
    if constexpr (Backend::kFaultsRaise) {
      check_rows(args);
    } else {
      fault_ = empty({1}, ScalarType::Int, on_);
      args.fault = static_cast<int32_t*>(fault_.mutable_data_ptr());
    }
    Backend::logits(args, on_);
  }

  LogitsArgs args = {};

 private:
  Tensor on_;
  LogitsTensor logits_;
  Tensor labels_;
  std::optional<PerToken> temperatures_;
  std::vector<Tensor> kept_;
  Tensor fault_;
};

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss_from_logits(
    const Tensor& logits, const Tensor& labels, const Tensor& inference_logprobs,
    const Tensor& advantages, const Tensor& loss_mask, std::optional<Tensor> temperature,
    double softcap, std::optional<Tensor> teacher_logprobs, std::optional<Tensor> loss_weights,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> normalizer, double log_low,
    double log_high, double adv_tau, double kl_tau, double teacher_tau, bool with_gradient) {
  LogitsCall rows(logits, labels, temperature, softcap);
  const Tensor logprobs = rows.per_token(rows.args.logprobs);
  const Tensor entropy = rows.per_token(rows.args.entropy);
  const Tensor gradient =
      with_gradient ? rows.new_gradient() : empty({0}, logits.scalar_type(), logits);

  IpoLossCall call(logprobs, inference_logprobs, advantages, loss_mask, teacher_logprobs,
                   loss_weights, cu_seqlens, normalizer, entropy,
                   {log_low, log_high, adv_tau, kl_tau, teacher_tau, 1}, false);
  call.check_values<Backend>();
  rows.args.loss = call.args;
  rows.args.normalized = logits.scalar_type() != ScalarType::Half;  // fp16 would underflow
  rows.run<Backend>();
  call.args.fault = rows.args.fault;
  call.run<Backend>();
  return {call.loss, gradient, logprobs, entropy, call.means, call.sums, call.extremes};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& labels,
                                                  std::optional<Tensor> temperature,
                                                  double softcap) {
  LogitsCall rows(logits, labels, temperature, softcap);
  const Tensor logprobs = rows.per_token(rows.args.logprobs);
  const Tensor entropy = rows.per_token(rows.args.entropy);
  const Tensor softmax = empty({2, rows.args.logits.rows}, rows.compute(), logits);
  rows.args.softmax = softmax.mutable_data_ptr();
  rows.run<Backend>();
  return {logprobs, entropy, softmax};
}

template <typename Backend>
Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels,
                               std::optional<Tensor> temperature, double softcap,
                               const Tensor& entropy, const Tensor& softmax,
                               const Tensor& grad_logprobs, const Tensor& grad_entropy) {
  LogitsCall rows(logits, labels, temperature, softcap);
  const int64_t count = rows.args.logits.rows;
  rows.args.entropy = rows.saved(entropy, count, "entropy");
  rows.args.softmax = rows.saved(softmax, 2 * count, "softmax");
  rows.args.grad_logprobs = rows.saved(grad_logprobs, count, "grad_logprobs");
  rows.args.grad_entropy = rows.saved(grad_entropy, count, "grad_entropy");
  const Tensor gradient = rows.new_gradient();
  rows.run<Backend>();
  return gradient;
}

template <typename Backend>
void scale_(const Tensor& gradient, const Tensor& factor) {
  IPO_EXT_CHECK(gradient.is_contiguous(), "gradient: expected a contiguous tensor");
  Backend::scale({gradient.mutable_data_ptr(), dtype_of(gradient, "gradient"), gradient.numel(),
                  scalar_input(factor, gradient, "factor")},
                 gradient);
}

}  // namespace ipo_ext
