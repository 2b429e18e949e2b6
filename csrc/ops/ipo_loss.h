// The operators from log-probabilities: allocation, dtypes and launch, the same for every backend.
#pragma once

#include <tuple>

#include "ops/arguments.h"
#include "ops/backend.h"

namespace ipo_ext {

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

inline void check_normalizer(const ScalarInput& normalizer, const char* name) {
  const double value = load_scalar(normalizer);
  IPO_EXT_CHECK(value >= 0, name, ": expected a count of tokens, at least 0, got ", value);
}

#define IPO_EXT_HOLD(member, tensor, ...) tensor##_(inputs.tensor, like_, #tensor),
#define IPO_EXT_PASS(member, tensor, ...) args.tensor = tensor##_.input();
#define IPO_EXT_NAME(member, tensor, ...) tensor##_,

// One call of the loss's kernels: checks the inputs, owns the copies that they needed and the
// results. The operators from logits make its log-probabilities and entropies first, and take a
// per-token gradient where sequences are judged alone.
class __attribute__((visibility("hidden"))) IpoLossCall {
 public:
  IpoLossCall(const Tensor& trainer_logprobs, const LossInputs& inputs,
              const std::optional<Tensor>& entropy, const LossSettings& settings,
              bool with_gradient)
      : like_(trainer_logprobs),
        trainer_logprobs_(trainer_logprobs, like_, "trainer_logprobs"),
        IPO_EXT_TOKEN_INPUTS(IPO_EXT_HOLD, IPO_EXT_HOLD) entropy_(entropy, like_, "entropy") {
    const bool float64 = is_float64(trainer_logprobs) || is_float64(inputs.inference_logprobs);
    args.compute_dtype = float64 ? DType::kFloat64 : DType::kFloat32;
    args.trainer_logprobs = trainer_logprobs_.input();
    IPO_EXT_TOKEN_INPUTS(IPO_EXT_PASS, IPO_EXT_PASS)
    args.entropy = entropy_.input();
    args.normalizer = scalar_input(inputs.normalizer, like_, "normalizer");
    args.params = settings.params;
    args.sequence_rules = settings.sequence_rules;
    take_mask(inputs.loss_mask);
    take_segments(inputs.cu_seqlens);
    allocate(inputs.cu_seqlens.has_value(), with_gradient);
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
      check_normalizer(args.normalizer, "normalizer");
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
    mask_ = as_contiguous(loss_mask, "loss_mask");
    args.loss_mask = static_cast<const uint8_t*>(mask_.const_data_ptr());
  }

  void take_segments(const std::optional<Tensor>& cu_seqlens) {
    args.segments = {nullptr, 1, like_.numel(), 0};
    if (!cu_seqlens.has_value()) return;
    IPO_EXT_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                      cu_seqlens->numel() > 0 && same_device(*cu_seqlens, like_),
                  "cu_seqlens: expected int32 [segments + 1] on the device of trainer_logprobs");
    cu_seqlens_ = as_contiguous(*cu_seqlens, "cu_seqlens");
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
  PerToken trainer_logprobs_, IPO_EXT_TOKEN_INPUTS(IPO_EXT_NAME, IPO_EXT_NAME) entropy_;
  Tensor mask_, cu_seqlens_;
};

#undef IPO_EXT_NAME
#undef IPO_EXT_PASS
#undef IPO_EXT_HOLD

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ipo_loss(const Tensor& trainer_logprobs,
                                                            const LossInputs& inputs,
                                                            const LossSettings& settings,
                                                            bool with_gradient) {
  IpoLossCall call(trainer_logprobs, inputs, std::nullopt, settings, with_gradient);
  call.check_values<Backend>();
  call.run<Backend>();
  return {call.loss, call.gradient, call.means, call.sums, call.extremes};
}

#define IPO_EXT_TAKE(member, tensor)                 \
  tensor##_ = PerToken(given.tensor, like, #tensor); \
  args.tensor = tensor##_.input();
#define IPO_EXT_DECLARE(member, tensor) PerToken tensor##_;

// What a call has beside its loss: checks the inputs, owns the copies that they needed.
class __attribute__((visibility("hidden"))) ComponentsCall {
 public:
  ComponentsCall(const Tensor& like, const Components& given, DType compute) {
    IPO_EXT_CHECK(!given.ref_kl_weights.has_value() || given.ref_logprobs.has_value(),
                  "ref_logprobs: expected a tensor with ref_kl_weights, got None");
    IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_TAKE)
    args.ce_scale = scalar_input(given.ce_scale, like, "ce_scale");
    args.ref_kl_scale = scalar_input(given.ref_kl_scale, like, "ref_kl_scale");
    args.params = given.params;
    means = empty({math::component_mean::kNumRows},
                  compute == DType::kFloat64 ? ScalarType::Double : ScalarType::Float, like);
    args.means = means.mutable_data_ptr();
  }

  // Checks the values that the backend can look at.
  template <typename Backend>
  void check_values() const {
    if constexpr (!Backend::kFaultsRaise) return;
    check_normalizer(args.ce_scale, "ce_scale");
    check_normalizer(args.ref_kl_scale, "ref_kl_scale");
  }

  ComponentArgs args;
  Tensor means;

 private:
  IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_DECLARE)
};

#undef IPO_EXT_DECLARE
#undef IPO_EXT_TAKE

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> component_loss(
    const Tensor& trainer_logprobs, const LossInputs& inputs, const LossSettings& settings,
    const Components& given, bool with_gradient) {
  IpoLossCall call(trainer_logprobs, inputs, std::nullopt, settings, with_gradient);
  ComponentsCall components(trainer_logprobs, given, call.args.compute_dtype);
  call.check_values<Backend>();
  components.check_values<Backend>();
  call.args.components = components.args;
  call.run<Backend>();
  return {call.loss, call.gradient, call.means, call.sums, call.extremes, components.means};
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
  const Tensor sums_rows = as_contiguous(sums, "sums");
  const Tensor extreme_rows = as_contiguous(extremes, "extremes");
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
