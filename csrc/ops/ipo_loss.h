// Tier 1's operators: allocation, dtypes and launch, the same text for every backend.
#pragma once

#include <tuple>

#include "ops/backend.h"

namespace ipo_ext {

inline constexpr const char* kIpoLossSchema =
    "ipo_loss(Tensor trainer_logprobs, Tensor inference_logprobs, Tensor advantages, Tensor "
    "loss_mask, "
    "Tensor? teacher_logprobs, Tensor? loss_weights, Tensor? cu_seqlens, Tensor? normalizer, "
    "float log_low, float log_high, float adv_tau, float kl_tau, float teacher_tau, bool "
    "with_gradient) "
    "-> (Tensor loss, Tensor gradient, Tensor means, Tensor sums, Tensor extremes)";

inline constexpr const char* kMetricMeansSchema =
    "metric_means(Tensor sums, Tensor extremes, bool float64) -> Tensor";

inline bool is_float64(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

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

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss(
    const Tensor& trainer_logprobs, const Tensor& inference_logprobs, const Tensor& advantages,
    const Tensor& loss_mask, std::optional<Tensor> teacher_logprobs,
    std::optional<Tensor> loss_weights, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> normalizer, double log_low, double log_high, double adv_tau,
    double kl_tau, double teacher_tau, bool with_gradient) {
  const Tensor& like = trainer_logprobs;
  const bool float64 = is_float64(trainer_logprobs) || is_float64(inference_logprobs);
  const ScalarType compute = float64 ? ScalarType::Double : ScalarType::Float;
  const int64_t tokens = trainer_logprobs.numel();

  const PerToken trainer(trainer_logprobs, like, "trainer_logprobs");
  const PerToken inference(inference_logprobs, like, "inference_logprobs");
  const PerToken advantage(advantages, like, "advantages");
  const PerToken teacher(teacher_logprobs, like, "teacher_logprobs");
  const PerToken weight(loss_weights, like, "loss_weights");

  IPO_EXT_CHECK(loss_mask.scalar_type() == ScalarType::Bool,
                "loss_mask: expected dtype torch.bool");
  check_per_token(loss_mask, like, "loss_mask");
  const Tensor mask = as_contiguous(loss_mask);

  const bool packed = cu_seqlens.has_value();
  if (packed) {
    IPO_EXT_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                      cu_seqlens->numel() > 0 && same_device(*cu_seqlens, like),
                  "cu_seqlens: expected int32 [segments + 1] on the device of trainer_logprobs");
    cu_seqlens = as_contiguous(*cu_seqlens);
  }
  const int64_t segments = packed ? cu_seqlens->numel() - 1 : 1;

  Tensor loss = empty({}, compute, like);
  const auto shape = trainer_logprobs.sizes();
  Tensor gradient = with_gradient ? empty({shape.begin(), shape.end()}, compute, like)
                                  : empty({0}, compute, like);
  Tensor means = empty_rows(math::mean::kNumRows, segments, packed, compute, like);
  Tensor sums = empty_rows(math::kNumSumRows, segments, packed, ScalarType::Double, like);
  Tensor extremes = empty_rows(math::extreme::kNumRows, segments, packed, ScalarType::Double, like);

  IpoLossArgs args;
  args.compute_dtype = float64 ? DType::kFloat64 : DType::kFloat32;
  args.trainer_logprobs = trainer.input();
  args.inference_logprobs = inference.input();
  args.advantages = advantage.input();
  args.teacher_logprobs = teacher.input();
  args.loss_weights = weight.input();
  args.loss_mask = static_cast<const bool*>(mask.const_data_ptr());
  args.normalizer = scalar_input(normalizer, like, "normalizer");
  args.params = {log_low, log_high, adv_tau, kl_tau, teacher_tau, 1};
  args.segments = {packed ? static_cast<const int32_t*>(cu_seqlens->const_data_ptr()) : nullptr,
                   segments, tokens, 0};
  args.loss = loss.mutable_data_ptr();
  args.gradient = with_gradient ? gradient.mutable_data_ptr() : nullptr;
  args.means = means.mutable_data_ptr();
  args.sums = static_cast<double*>(sums.mutable_data_ptr());
  args.extremes = static_cast<double*>(extremes.mutable_data_ptr());
  if constexpr (Backend::kFaultsRaise) {
    if (packed) check_partition(args.segments);
    check_normalizer(args.normalizer);
  }
  const Tensor workspace =
      empty({static_cast<int64_t>(Backend::workspace_bytes(args))}, ScalarType::Byte, like);
  args.workspace = workspace.mutable_data_ptr();

  Backend::ipo_loss(args, like);
  return {loss, gradient, means, sums, extremes};
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
