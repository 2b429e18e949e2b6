// The operator of score centering, and how the operators from logits make use of it.
#pragma once

#include <tuple>

#include "ops/ipo_loss.h"

namespace ipo_ext {

// One call of its kernels beside a loss: checks the inputs that the loss has not, owns what they
// needed and the results.
class __attribute__((visibility("hidden"))) CenteringCall {
 public:
  // `loss` outlives the call.
  CenteringCall(const IpoLossCall& loss, const Tensor& trainer_mask_logprobs,
                const Tensor& inference_mask_logprobs, bool with_gradient)
      : trainer_mask_logprobs_(as_contiguous(trainer_mask_logprobs, "trainer_mask_logprobs")),
        inference_mask_logprobs_(
            as_contiguous(inference_mask_logprobs, "inference_mask_logprobs")) {
    const IpoLossArgs& of_loss = loss.args;
    args.compute_dtype = of_loss.compute_dtype;
    args.trainer_mask_logprobs =
        take(trainer_mask_logprobs_, of_loss.segments.tokens, "trainer_mask_logprobs");
    args.inference_mask_logprobs =
        take(inference_mask_logprobs_, of_loss.segments.tokens, "inference_mask_logprobs");
    IPO_EXT_CHECK(trainer_mask_logprobs_.numel() == inference_mask_logprobs_.numel(),
                  "inference_mask_logprobs: expected ", trainer_mask_logprobs_.numel(),
                  " elements, got ", inference_mask_logprobs_.numel());
    args.width = trainer_mask_logprobs_.size(-1);
    args.trainer_logprobs = of_loss.trainer_logprobs;
    args.inference_logprobs = of_loss.inference_logprobs;
    args.advantages = of_loss.advantages;
    args.loss_weights = of_loss.loss_weights;
    args.loss_mask = of_loss.loss_mask;
    args.normalizer = of_loss.normalizer;
    args.segments = of_loss.segments;
    args.params = {of_loss.params.high, of_loss.params.log_ratio_cap, of_loss.params.adv_tau, 0};
    const bool float64 = is_float64(trainer_mask_logprobs_);
    args.gradient_dtype = float64 ? DType::kFloat64 : DType::kFloat32;
    gradient = empty(with_gradient ? sizes_of(trainer_mask_logprobs_) : std::vector<int64_t>{0},
                     float64 ? ScalarType::Double : ScalarType::Float, trainer_mask_logprobs_);
    if (with_gradient) args.gradient = gradient.mutable_data_ptr();
  }

  // [tokens]: which have a term.
  void take_replayed(const Tensor& replayed) {
    IPO_EXT_CHECK(replayed.scalar_type() == ScalarType::Bool &&
                      replayed.numel() == args.segments.tokens &&
                      same_device(replayed, trainer_mask_logprobs_),
                  "replayed: expected a boolean for each token");
    replayed_ = as_contiguous(replayed, "replayed");
    args.replays = static_cast<const uint8_t*>(replayed_->const_data_ptr());
  }

  // Adds to the loss, and to its metrics, which measure replay.
  void add_to(IpoLossCall& loss) {
    const int64_t segments = loss.args.segments.count;
    const int64_t row = math::replay::centering_loss;
    args.fault = loss.args.fault;
    args.sums = loss.args.sums + (math::kNumSumRows + row) * segments;
    args.active = loss.args.sums + math::count::active * segments;
    args.means = loss.means_of(math::mean::kNumRows + row);
    args.loss = loss.args.loss;
    args.adds_to_loss = true;
  }

  template <typename Backend>
  void run() {
    const Tensor& on = trainer_mask_logprobs_;
    const Tensor terms = empty({args.segments.tokens}, ScalarType::Double, on);
    args.terms = static_cast<double*>(terms.mutable_data_ptr());
    Backend::score_centering(args, on);
  }

  CenteringArgs args = {};
  Tensor gradient;

 private:
  static TokenInput take(const Tensor& tensor, int64_t tokens, const char* name) {
    IPO_EXT_CHECK(tensor.dim() > 0 && tensor.numel() == tokens * tensor.size(-1), name,
                  ": expected [..., ids] of ", tokens, " tokens");
    const DType dtype = dtype_of(tensor, name);
    IPO_EXT_CHECK(is_floating(dtype), name, ": expected a floating dtype");
    return {tensor.const_data_ptr(), dtype};
  }

  Tensor trainer_mask_logprobs_, inference_mask_logprobs_;
  std::optional<Tensor> replayed_;
};

// Loss, gradient by trainer_mask_logprobs and sums of the terms: [1, segments], or [1] where
// nothing is packed.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> score_centering(
    const Tensor& trainer_mask_logprobs, const Tensor& trainer_logprobs, const LossInputs& inputs,
    const LossSettings& settings, const Tensor& inference_mask_logprobs,
    const std::optional<Tensor>& replayed, bool with_gradient) {
  IpoLossCall loss(trainer_logprobs, inputs, std::nullopt, settings, false);
  loss.check_values<Backend>();
  CenteringCall call(loss, trainer_mask_logprobs, inference_mask_logprobs, with_gradient);
  const Tensor sums = empty_rows(1, call.args.segments.count, inputs.cu_seqlens.has_value(),
                                 ScalarType::Double, trainer_logprobs);
  call.args.sums = static_cast<double*>(sums.mutable_data_ptr());
  call.args.loss = loss.loss.mutable_data_ptr();
  if (replayed.has_value()) call.take_replayed(*replayed);
  call.run<Backend>();
  return {loss.loss, call.gradient, sums};
}

}  // namespace ipo_ext
