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
    if (inputs.sequence_totals.has_value()) take_totals(*inputs.sequence_totals);
    allocate(with_gradient);
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

  // Measures replay too, in rows behind the loss's own. `replayed` is [tokens]; an entropy that is
  // not finite is counted, and adds nothing.
  void measure_replay(const Tensor& replayed) {
    IPO_EXT_CHECK(replayed.scalar_type() == ScalarType::Bool,
                  "replayed: expected dtype torch.bool");
    check_per_token(replayed, like_, "replayed");
    replayed_ = as_contiguous(replayed, "replayed");
    any_entropy_ = args.entropy;
    if (args.entropy.data != nullptr) {
      finite_entropy_ = empty(
          {like_.numel()},
          args.entropy.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float, like_);
      args.entropy.data = finite_entropy_->const_data_ptr();
    }
    allocate_metrics(math::replay::kNumRows);
  }

  // What the rules on sequences look at, of each segment: rows of sums and of extremes.
  template <typename Backend>
  std::tuple<Tensor, Tensor> statistics() {
    const Tensor workspace = new_workspace<Backend>();
    const int64_t segments = args.segments.count;
    Tensor sums = empty({math::statistics::kNumSums, segments}, ScalarType::Double, like_);
    Tensor extremes = empty({math::statistics::kNumExtremes, segments}, ScalarType::Double, like_);
    Backend::sequence_statistics({args, static_cast<double*>(sums.mutable_data_ptr()),
                                  static_cast<double*>(extremes.mutable_data_ptr())},
                                 like_);
    return {sums, extremes};
  }

  template <typename Backend>
  void run() {
    const Tensor workspace = new_workspace<Backend>();
    if (finite_entropy_.has_value())
      Backend::finite_values({any_entropy_, finite_entropy_->mutable_data_ptr(), like_.numel()},
                             like_);
    Backend::ipo_loss(args, like_);
    if (!replayed_.has_value()) return;
    const auto* replays = static_cast<const uint8_t*>(replayed_->const_data_ptr());
    Backend::replay_metrics({args.compute_dtype, true, replays, any_entropy_, args.loss_mask,
                             args.segments, args.sums, args.means},
                            like_);
  }

  // A row of the means: [segments].
  void* means_of(int64_t row) const {
    const int64_t bytes = args.compute_dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
    return static_cast<char*>(args.means) + row * args.segments.count * bytes;
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
    is_packed_ = cu_seqlens.has_value();
    if (!cu_seqlens.has_value()) return;
    IPO_EXT_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                      cu_seqlens->numel() > 0 && same_device(*cu_seqlens, like_),
                  "cu_seqlens: expected int32 [segments + 1] on the device of trainer_logprobs");
    cu_seqlens_ = as_contiguous(*cu_seqlens, "cu_seqlens");
    args.segments.cu_seqlens = static_cast<const int32_t*>(cu_seqlens_.const_data_ptr());
    args.segments.count = cu_seqlens_.numel() - 1;
  }

  void take_totals(const Tensor& totals) {
    IPO_EXT_CHECK(is_float64(totals) &&
                      totals.numel() == math::statistics::kNumTotals * args.segments.count &&
                      same_device(totals, like_),
                  "sequence_totals: expected float64 [", math::statistics::kNumTotals,
                  ", segments] on the device of trainer_logprobs");
    totals_ = as_contiguous(totals, "sequence_totals");
    args.sequence_totals = static_cast<const double*>(totals_.const_data_ptr());
  }

  template <typename Backend>
  Tensor new_workspace() {
    Tensor workspace =
        empty({static_cast<int64_t>(Backend::workspace_bytes(args))}, ScalarType::Byte, like_);
    args.workspace = workspace.mutable_data_ptr();
    return workspace;
  }

  void allocate(bool with_gradient) {
    const auto shape = like_.sizes();
    loss = empty({}, compute(), like_);
    gradient = with_gradient ? empty({shape.begin(), shape.end()}, compute(), like_)
                             : empty({0}, compute(), like_);
    args.loss = loss.mutable_data_ptr();
    args.gradient = with_gradient ? gradient.mutable_data_ptr() : nullptr;
    allocate_metrics(0);
  }

  // With so many rows of sums and of means behind the loss's own.
  void allocate_metrics(int64_t more) {
    const int64_t segments = args.segments.count;
    const auto rows = [&](int64_t count, ScalarType dtype) {
      return empty_rows(count, segments, is_packed_, dtype, like_);
    };
    means = rows(math::mean::kNumRows + more, compute());
    sums = rows(math::kNumSumRows + more, ScalarType::Double);
    extremes = rows(math::extreme::kNumRows, ScalarType::Double);
    args.means = means.mutable_data_ptr();
    args.sums = static_cast<double*>(sums.mutable_data_ptr());
    args.extremes = static_cast<double*>(extremes.mutable_data_ptr());
  }

  ScalarType compute() const {
    return args.compute_dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  }

  Tensor like_;
  PerToken trainer_logprobs_, IPO_EXT_TOKEN_INPUTS(IPO_EXT_NAME, IPO_EXT_NAME) entropy_;
  Tensor mask_, cu_seqlens_, totals_;
  bool is_packed_ = false;
  std::optional<Tensor> replayed_, finite_entropy_;
  TokenInput any_entropy_;
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
std::tuple<Tensor, Tensor> sequence_statistics(const Tensor& trainer_logprobs,
                                               const LossInputs& inputs,
                                               const LossSettings& settings) {
  IPO_EXT_CHECK(settings.params.judges_sequences, "judges_sequences: expected True, got False");
  IpoLossCall call(trainer_logprobs, inputs, std::nullopt, settings, false);
  call.check_values<Backend>();
  return call.statistics<Backend>();
}

// CPU only: reads the values. The words "sequence_ids" at the start tell Python to raise
// IndexError.
inline void check_sequence_ids(const FoldArgs& args) {
  for (int64_t s = 0; s < args.segments; ++s) {
    const int32_t id = args.sequence_ids[s];
    IPO_EXT_CHECK(id >= 0 && id < args.sequences, "sequence_ids: expected ids in [0, ",
                  args.sequences, "), num_sequences, got ", id, " at index ", s);
  }
}

template <typename Backend>
std::tuple<Tensor, Tensor> fold_segments(const Tensor& sums, const Tensor& extremes,
                                         const Tensor& sequence_ids, int64_t num_sequences) {
  const auto are_rows = [&](const Tensor& rows) {
    return is_float64(rows) && rows.dim() == 2 && rows.size(1) == sequence_ids.numel() &&
           same_device(rows, sequence_ids);
  };
  IPO_EXT_CHECK(sequence_ids.scalar_type() == ScalarType::Int,
                "sequence_ids: expected dtype int32");
  IPO_EXT_CHECK(num_sequences >= 0, "num_sequences: expected a count, got ", num_sequences);
  IPO_EXT_CHECK(are_rows(sums) && are_rows(extremes) && extremes.size(0) % 2 == 0,
                "sums, extremes: expected float64 [rows, ", sequence_ids.numel(),
                "] on the device of sequence_ids");
  const Tensor ids = as_contiguous(sequence_ids, "sequence_ids");
  const Tensor from_sums = as_contiguous(sums, "sums");
  const Tensor from_extremes = as_contiguous(extremes, "extremes");
  Tensor folded_sums = empty({sums.size(0), num_sequences}, ScalarType::Double, sums);
  Tensor folded_extremes = empty({extremes.size(0), num_sequences}, ScalarType::Double, sums);
  const FoldArgs args = {static_cast<const int32_t*>(ids.const_data_ptr()),
                         ids.numel(),
                         num_sequences,
                         static_cast<int>(sums.size(0)),
                         static_cast<int>(extremes.size(0)),
                         static_cast<const double*>(from_sums.const_data_ptr()),
                         static_cast<const double*>(from_extremes.const_data_ptr()),
                         static_cast<double*>(folded_sums.mutable_data_ptr()),
                         static_cast<double*>(folded_extremes.mutable_data_ptr())};
  if constexpr (Backend::kFaultsRaise) check_sequence_ids(args);
  Backend::fold_segments(args, sums);
  return {folded_sums, folded_extremes};
}

template <typename Backend>
Tensor metric_means(const Tensor& sums, const Tensor& extremes, bool float64) {
  const bool packed = sums.dim() == 2;
  const int64_t segments = packed ? sums.size(1) : 1;
  const int64_t more = sums.dim() > 0 ? sums.size(0) - math::kNumSumRows : -1;  // of replay
  IPO_EXT_CHECK(
      is_float64(sums) && sums.dim() <= 2 && (more == 0 || more == math::replay::kNumRows),
      "sums: expected float64 [", math::kNumSumRows, "] or [", math::kNumSumRows,
      ", segments], or ", math::replay::kNumRows, " rows more");
  IPO_EXT_CHECK(is_float64(extremes) && extremes.numel() == math::extreme::kNumRows * segments &&
                    same_device(extremes, sums),
                "extremes: expected float64 [", math::extreme::kNumRows, "] or [",
                math::extreme::kNumRows, ", segments] on the device of sums");
  const Tensor sums_rows = as_contiguous(sums, "sums");
  const Tensor extreme_rows = as_contiguous(extremes, "extremes");
  Tensor means = empty_rows(math::mean::kNumRows + more, segments, packed,
                            float64 ? ScalarType::Double : ScalarType::Float, sums);
  const DType compute = float64 ? DType::kFloat64 : DType::kFloat32;
  const auto* given = static_cast<const double*>(sums_rows.const_data_ptr());
  Backend::metric_means(
      {compute, segments, given, static_cast<const double*>(extreme_rows.const_data_ptr()),
       means.mutable_data_ptr()},
      sums);
  if (more > 0)
    Backend::replay_metrics({compute,
                             false,
                             nullptr,
                             {},
                             nullptr,
                             {nullptr, segments, 0, 0},
                             const_cast<double*>(given),
                             means.mutable_data_ptr()},
                            sums);
  return means;
}

}  // namespace ipo_ext
