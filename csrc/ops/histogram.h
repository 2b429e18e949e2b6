// The operator that counts log-ratios by bins.
#pragma once

#include "ops/ipo_loss.h"

namespace ipo_ext {

// int64 [bins, segments], or [bins] where nothing is packed.
template <typename Backend>
Tensor log_ratio_histogram(const Tensor& trainer_logprobs, const Tensor& inference_logprobs,
                           const Tensor& loss_mask, const std::optional<Tensor>& cu_seqlens) {
  const IpoLossCall loss(trainer_logprobs, loss_mask, cu_seqlens, std::nullopt);
  loss.check_values<Backend>();
  const PerToken trainer(trainer_logprobs, trainer_logprobs, "trainer_logprobs");
  const PerToken inference(inference_logprobs, trainer_logprobs, "inference_logprobs");
  const Segments& segments = loss.args.segments;
  Tensor counts = empty_rows(math::kBins, segments.count, cu_seqlens.has_value(), ScalarType::Long,
                             trainer_logprobs);
  torch::stable::zero_(counts);
  const bool float64 = is_float64(trainer_logprobs) || is_float64(inference_logprobs);
  Backend::histogram(
      {float64 ? DType::kFloat64 : DType::kFloat32, trainer.input(), inference.input(),
       loss.args.loss_mask, segments, static_cast<int64_t*>(counts.mutable_data_ptr())},
      trainer_logprobs);
  return counts;
}

}  // namespace ipo_ext
