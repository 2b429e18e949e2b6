// Tier 1's operators: allocation, dtypes and launch, the same text for every backend.
#pragma once

#include <limits>
#include <tuple>

#include "ops/backend.h"

namespace ipo_ext {

// To a rollout rule, without cu_seqlens all tokens are one sequence.
inline constexpr const char* kIpoLossSchema =
    "ipo_loss(Tensor trainer_logprobs, Tensor inference_logprobs, Tensor advantages, Tensor "
    "loss_mask, "
    "Tensor? teacher_logprobs, Tensor? loss_weights, Tensor? cu_seqlens, Tensor? normalizer, "
    "int mask_rule, bool kl_active, float? rollout_low, float low, float high, float adv_tau, "
    "float kl_tau, float teacher_tau, bool with_gradient) "
    "-> (Tensor loss, Tensor gradient, Tensor means, Tensor sums, Tensor extremes)";

inline constexpr const char* kMetricMeansSchema =
    "metric_means(Tensor sums, Tensor extremes, bool float64) -> Tensor";

inline bool is_float64(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

inline math::LossParams<double> loss_params(int64_t mask_rule, bool kl_active,
                                            std::optional<double> rollout_low, double low,
                                            double high, double adv_tau, double kl_tau,
                                            double teacher_tau) {
  IPO_EXT_CHECK(mask_rule >= 0 && mask_rule < static_cast<int64_t>(math::MaskRule::kCount),
                "mask_rule: expected the index of a rule, got ", mask_rule);
  math::LossParams<double> params = {};
  params.rule = static_cast<math::MaskRule>(mask_rule);
  params.low = low;
  params.high = high;
  params.adv_tau = adv_tau;
  params.kl_tau = kl_tau;
  params.teacher_tau = teacher_tau;
  params.kl_active = kl_active;
  params.has_rollout_rule = rollout_low.has_value();
  params.rollout_low = rollout_low.value_or(-std::numeric_limits<double>::infinity());
  return params;
}

// CPU only: reads the values.
inline void check_partition(const Segments& segments) {
  for (int64_t s = 0; s <= segments.count; ++s) {
    IPO_EXT_CHECK(segments.entry_is_valid(s),
                  "cu_seqlens: expected a partition of the tokens, [0, ..., ", segments.tokens,
                  "] without a decrease, got ", segments.cu_seqlens[s], " at index ", s, " of ",
                  segments.count + 1);
  }
}

inline void check_normalizer(const ScalarInput& normalizer) {
  const double value = load_scalar(normalizer);
  IPO_EXT_CHECK(value >= 0, "normalizer: expected a count of tokens, at least 0, got ", value);
}

// One call of tier 1's kernels: checks the inputs, owns the copies that they needed and the
// results. Tier 2 makes its log-probabilities and entropies first, and takes a per-token gradient
// under a rollout rule alone.
class __attribute__((visibility("hidden"))) IpoLossCall {
 public:
  IpoLossCall(const Tensor& trainer_logprobs, const Tensor& inference_logprobs,
              const Tensor& advantages, const Tensor& loss_mask,
              const std::optional<Tensor>& teacher_logprobs,
              const std::optional<Tensor>& loss_weights, const std::optional<Tensor>& cu_seqlens,
              const std::optional<Tensor>& normalizer, const std::optional<Tensor>& entropy,
              const math::LossParams<double>& params, bool with_gradient)
      : like_(trainer_logprobs),
        trainer_(trainer_logprobs, like_, "trainer_logprobs"),
        inference_(inference_logprobs, like_, "inference_logprobs"),
        advantage_(advantages, like_, "advantages"),
        teacher_(teacher_logprobs, like_, "teacher_logprobs"),
        weight_(loss_weights, like_, "loss_weights"),
        entropy_(entropy, like_, "entropy") {
    const bool float64 = is_float64(trainer_logprobs) || is_float64(inference_logprobs);
    args.compute_dtype = float64 ? DType::kFloat64 : DType::kFloat32;
    args.trainer_logprobs = trainer_.input();
    args.inference_logprobs = inference_.input();
    args.advantages = advantage_.input();
    args.teacher_logprobs = teacher_.input();
    args.loss_weights = weight_.input();
    args.entropy = entropy_.input();
    args.normalizer = scalar_input(normalizer, like_, "normalizer");
    args.params = params;
    take_mask(loss_mask);
    take_segments(cu_seqlens);
    allocate(cu_seqlens.has_value(), with_gradient);
  }

  // Only what a fault can hide in, for tokens whose log-probabilities do not exist yet.
  IpoLossCall(const Tensor& like, const Tensor& loss_mask, const std::optional<Tensor>& cu_seqlens,
              const std::optional<Tensor>& normalizer)
      : like_(like) {
    args.normalizer = scalar_input(normalizer, like_, "normalizer");
    take_mask(loss_mask);
    take_segments(cu_seqlens);
  }

  // Checks the values that the backend can look at.
  template <typename Backend>
  void check_values() const {
    if constexpr (Backend::kFaultsRaise) {
      if (args.segments.cu_seqlens != nullptr) check_partition(args.segments);
      check_normalizer(args.normalizer);
    }
  }

  template <typename Backend>
  void run() {
    const Tensor workspace =
        empty({static_cast<int64_t>(Backend::workspace_bytes(args))}, ScalarType::Byte, like_);
    args.workspace = workspace.mutable_data_ptr();
    Backend::ipo_loss(args, like_);
  }

  IpoLossArgs args = {};
  Tensor loss, gradient, means, sums, extremes;

 private:
  void take_mask(const Tensor& loss_mask) {
    IPO_EXT_CHECK(loss_mask.scalar_type() == ScalarType::Bool,
                  "loss_mask: expected dtype torch.bool");
    check_per_token(loss_mask, like_, "loss_mask");
    mask_ = as_contiguous(loss_mask);
    args.loss_mask = static_cast<const uint8_t*>(mask_.const_data_ptr());
  }

  void take_segments(const std::optional<Tensor>& cu_seqlens) {
    args.segments = {nullptr, 1, like_.numel(), 0};
    if (!cu_seqlens.has_value()) return;
    IPO_EXT_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                      cu_seqlens->numel() > 0 && same_device(*cu_seqlens, like_),
                  "cu_seqlens: expected int32 [segments + 1] on the device of trainer_logprobs");
    cu_seqlens_ = as_contiguous(*cu_seqlens);
    args.segments.cu_seqlens = static_cast<const int32_t*>(cu_seqlens_.const_data_ptr());
    args.segments.count = cu_seqlens_.numel() - 1;
  }

  void allocate(bool packed, bool with_gradient) {
    const ScalarType compute =
        args.compute_dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    const int64_t segments = args.segments.count;
    const auto shape = like_.sizes();
    loss = empty({}, compute, like_);
    gradient = with_gradient ? empty({shape.begin(), shape.end()}, compute, like_)
                             : empty({0}, compute, like_);
    means = empty_rows(math::mean::kNumRows, segments, packed, compute, like_);
    sums = empty_rows(math::kNumSumRows, segments, packed, ScalarType::Double, like_);
    extremes = empty_rows(math::extreme::kNumRows, segments, packed, ScalarType::Double, like_);
    args.loss = loss.mutable_data_ptr();
    args.gradient = with_gradient ? gradient.mutable_data_ptr() : nullptr;
    args.means = means.mutable_data_ptr();
    args.sums = static_cast<double*>(sums.mutable_data_ptr());
    args.extremes = static_cast<double*>(extremes.mutable_data_ptr());
  }

  Tensor like_;
  PerToken trainer_, inference_, advantage_, teacher_, weight_, entropy_;
  Tensor mask_, cu_seqlens_;
};

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss(
    const Tensor& trainer_logprobs, const Tensor& inference_logprobs, const Tensor& advantages,
    const Tensor& loss_mask, std::optional<Tensor> teacher_logprobs,
    std::optional<Tensor> loss_weights, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> normalizer, int64_t mask_rule, bool kl_active,
    std::optional<double> rollout_low, double low, double high, double adv_tau, double kl_tau,
    double teacher_tau, bool with_gradient) {
  IpoLossCall call(
      trainer_logprobs, inference_logprobs, advantages, loss_mask, teacher_logprobs, loss_weights,
      cu_seqlens, normalizer, std::nullopt,
      loss_params(mask_rule, kl_active, rollout_low, low, high, adv_tau, kl_tau, teacher_tau),
      with_gradient);
  call.check_values<Backend>();
  call.run<Backend>();
  return {call.loss, call.gradient, call.means, call.sums, call.extremes};
}

template <typename Backend>
Tensor metric_means(const Tensor& sums, const Tensor& extremes, bool float64) {
  const bool packed = sums.dim() == 2;
  const int64_t segments = packed ? sums.size(1) : 1;
  IPO_EXT_CHECK(is_float64(sums) && sums.numel() == math::kNumSumRows * segments,
                "sums: expected float64 [", math::kNumSumRows, "] or [", math::kNumSumRows,
                ", segments]");
  IPO_EXT_CHECK(is_float64(extremes) && extremes.numel() == math::extreme::kNumRows * segments &&
                    same_device(extremes, sums),
                "extremes: expected float64 [", math::extreme::kNumRows, "] or [",
                math::extreme::kNumRows, ", segments] on the device of sums");
  const Tensor sums_rows = as_contiguous(sums);
  const Tensor extreme_rows = as_contiguous(extremes);
  Tensor means = empty_rows(math::mean::kNumRows, segments, packed,
                            float64 ? ScalarType::Double : ScalarType::Float, sums);
  Backend::metric_means(
      {float64 ? DType::kFloat64 : DType::kFloat32, segments,
       static_cast<const double*>(sums_rows.const_data_ptr()),
       static_cast<const double*>(extreme_rows.const_data_ptr()), means.mutable_data_ptr()},
      sums);
  return means;
}

}  // namespace ipo_ext
