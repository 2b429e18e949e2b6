// The loss from log-probabilities: loss, gradient and every metric, in one pass over the tokens.
// What the kernels are given and what both backends do alike stands here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/inputs.h"
#include "kernels/parallel_for.h"
#include "kernels/segments.h"
#include "math/components.h"
#include "math/metrics.h"
#include "math/token_loss.h"

struct CUstream_st;

namespace ipo_ext {

#define IPO_EXT_MEMBER(member, tensor, ...) TokenInput tensor;

// What stands beside the loss; no tensors for no component.
struct ComponentArgs {
  IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_MEMBER)  // [tokens], or null
  ScalarInput ce_scale;
  ScalarInput ref_kl_scale;
  math::ComponentParams<double> params = {};  // the inverse normalizers are the kernels' to fill
  void* means = nullptr;                      // [component_mean::kNumRows] compute

  IPO_HOST_DEVICE bool are_wanted() const { return means != nullptr; }
};

struct IpoLossArgs {
  DType compute_dtype;          // kFloat32 or kFloat64; the comments below call it "compute"
  TokenInput trainer_logprobs;  // [tokens]
  IPO_EXT_TOKEN_INPUTS(IPO_EXT_MEMBER, IPO_EXT_MEMBER)  // [tokens], or null where optional
  TokenInput entropy;                                   // [tokens] or null; only measured
  const uint8_t* loss_mask;                             // [tokens] booleans: any byte but 0 is true
  ScalarInput normalizer;
  math::LossParams<double> params;  // inv_normalizer is the kernels' to fill
  Segments segments;                // tile_log2 is the launchers' to fill
  const int32_t* fault = nullptr;   // [1], CUDA: not 0 poisons the loss; null: nothing is wrong

  void* loss;        // [] compute
  void* gradient;    // [tokens] compute; null where none is wanted
  void* means;       // [mean::kNumRows, segments] compute
  double* sums;      // [kNumSumRows, segments]
  double* extremes;  // [extreme::kNumRows, segments]
  void* workspace;   // [workspace_bytes(args)], aligned to 16 bytes, uninitialised

  // With params.judges_sequences. Last, so that nothing that all kernels read moves.
  math::SequenceRules sequence_rules;
  ComponentArgs components;
  // [statistics::kNumTotals, segments], or null: what the rules look at, where a segment is a piece
  // of a sequence that other calls have pieces of.
  const double* sequence_totals = nullptr;
};

#undef IPO_EXT_MEMBER

// What the steps leave for each other, in args.workspace.
template <typename E>
struct Workspace {
  math::TileSums<E>* slots;            // [segments.num_slots()]
  double* tile_losses;                 // [segments.num_tiles()]
  math::BoundCounts<E>* bound_counts;  // [segments.num_slots()]; under other rules than the default
  math::SequenceVerdict* verdicts;     // [segments.count]; this and the last where sequences are
                                       // judged alone
  math::ComponentTotals* components;   // [segments.num_tiles()]; with components alone
  math::SequenceSums<E>* sequence_slots;  // [judged.num_slots()]; as large as a backend likes

  static size_t bytes(const IpoLossArgs& args, const Segments& segments, const Segments& judged) {
    size_t bytes =
        segments.num_tiles() * sizeof(double) +
        segments.num_slots() * (sizeof(math::TileSums<E>) + sizeof(math::BoundCounts<E>));
    if (args.components.are_wanted()) bytes += segments.num_tiles() * sizeof(math::ComponentTotals);
    if (args.params.judges_sequences) {
      bytes += segments.count * sizeof(math::SequenceVerdict) +
               judged.num_slots() * sizeof(math::SequenceSums<E>);
    }
    return bytes;
  }
  IPO_HOST_DEVICE explicit Workspace(const IpoLossArgs& args)
      : slots(static_cast<math::TileSums<E>*>(args.workspace)),
        tile_losses(reinterpret_cast<double*>(slots + args.segments.num_slots())),
        bound_counts(
            reinterpret_cast<math::BoundCounts<E>*>(tile_losses + args.segments.num_tiles())),
        verdicts(
            reinterpret_cast<math::SequenceVerdict*>(bound_counts + args.segments.num_slots())),
        components(reinterpret_cast<math::ComponentTotals*>(
            verdicts + (args.params.judges_sequences ? args.segments.count : 0))),
        sequence_slots(reinterpret_cast<math::SequenceSums<E>*>(
            components + (args.components.are_wanted() ? args.segments.num_tiles() : 0))) {}
};

// Returns what a span adds to the loss, before it is normalized.
template <typename E>
IPO_HOST_DEVICE double loss_of_span(const math::TileSums<E>& span) {
  return span.sums[math::sum::pg_loss] + span.sums[math::sum::kl_loss];
}

struct MetricMeansArgs {
  DType compute_dtype;
  int64_t segments;
  const double* sums;      // [kNumSumRows, segments]
  const double* extremes;  // [extreme::kNumRows, segments]
  void* means;             // [mean::kNumRows, segments] compute
};

// What the rules look at, of each segment of a call that judges sequences.
struct SequenceStatisticsArgs {
  IpoLossArgs loss;
  double* sums;      // [statistics::kNumSums, segments]
  double* extremes;  // [statistics::kNumExtremes, segments]
};

// Segments that are pieces of sequences: rows of their sums, and of their smallest and, in the
// second half, largest values, become rows of the sequences'.
struct FoldArgs {
  const int32_t* sequence_ids;  // [segments]; one out of range names no sequence
  int64_t segments, sequences;
  int num_sums, num_extremes;
  const double* sums;       // [num_sums, segments]
  const double* extremes;   // [num_extremes, segments]
  double* folded_sums;      // [num_sums, sequences]
  double* folded_extremes;  // [num_extremes, sequences]

  IPO_HOST_DEVICE int num_rows() const { return num_sums + num_extremes; }
};

// One row of a fold, and how its values combine.
struct FoldedRow {
  const double* values;  // [segments]
  double* folded;        // [sequences]
  enum { kSum, kSmallest, kLargest } by;

  IPO_HOST_DEVICE double nothing() const {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    return by == kSum ? 0 : by == kSmallest ? kInfinity : -kInfinity;
  }
  IPO_HOST_DEVICE double combine(double a, double b) const {
    return by == kSum ? a + b : by == kSmallest ? math::smaller(a, b) : math::larger(a, b);
  }
};

IPO_HOST_DEVICE FoldedRow folded_row(const FoldArgs& args, int i) {
  if (i < args.num_sums)
    return {args.sums + i * args.segments, args.folded_sums + i * args.sequences, FoldedRow::kSum};
  i -= args.num_sums;
  return {args.extremes + i * args.segments, args.folded_extremes + i * args.sequences,
          i < args.num_extremes / 2 ? FoldedRow::kSmallest : FoldedRow::kLargest};
}

// The settings in the compute dtype, without the normalizer, which the host may not be able to
// read.
template <typename E>
IPO_HOST_DEVICE math::LossParams<E> settings_for(const math::LossParams<double>& params) {
  using math::MaskRule;
  using math::PolicyForm;
#define IPO_EXT_CAST(schema, Type, name) static_cast<Type>(params.name),
  return {IPO_EXT_LOSS_NUMBERS(IPO_EXT_CAST) E(0),
          IPO_EXT_LOSS_RULES(IPO_EXT_CAST) params.sequence};
#undef IPO_EXT_CAST
}

template <typename E>
IPO_HOST_DEVICE E inverse_normalizer_of_tokens(const IpoLossArgs& args) {
  return static_cast<E>(math::inverse_normalizer<E>(load_scalar(args.normalizer)));
}

// The settings in the compute dtype.
template <typename E>
IPO_HOST_DEVICE math::LossParams<E> params_for(const IpoLossArgs& args) {
  math::LossParams<E> params = settings_for<E>(args.params);
  params.inv_normalizer = inverse_normalizer_of_tokens<E>(args);
  return params;
}

IPO_HOST_DEVICE math::TokenExtras extras_of(const IpoLossArgs& args) {
  return {args.teacher_logprobs.data != nullptr, args.entropy.data != nullptr};
}

template <typename E>
IPO_HOST_DEVICE double inverse_normalizer_of(const IpoLossArgs& args) {
  return math::inverse_normalizer<E>(load_scalar(args.normalizer));
}

// Returns the loss of all segments from the fp64 sum of its terms; 0 for a normalizer of 0,
// whatever the sum.
IPO_HOST_DEVICE double normalized_loss(double sum, double inverse) {
  return inverse == 0 ? 0 : sum * inverse;
}

// The settings of the components in the compute dtype.
template <typename E>
IPO_HOST_DEVICE math::ComponentParams<E> component_params_for(const ComponentArgs& args) {
#define IPO_EXT_CAST(schema, Type, name) static_cast<Type>(args.params.name),
  return {IPO_EXT_COMPONENT_SETTINGS(IPO_EXT_CAST) static_cast<E>(
              math::inverse_normalizer<E>(load_scalar(args.ce_scale))),
          static_cast<E>(math::inverse_normalizer<E>(load_scalar(args.ref_kl_scale)))};
#undef IPO_EXT_CAST
}

// A token of the components. A missing weight is 0: the component has no tokens.
template <typename E>
IPO_HOST_DEVICE math::ComponentToken<E> component_token(const IpoLossArgs& args, int64_t index) {
#define IPO_EXT_LOAD(member, tensor) load_token<E>(args.components.tensor, index, 0),
  return {load_token<E>(args.trainer_logprobs, index, 0),
          load_token<E>(args.inference_logprobs, index, 0),
          IPO_EXT_COMPONENT_TOKEN_INPUTS(IPO_EXT_LOAD)};
#undef IPO_EXT_LOAD
}

// Returns what both components add to the loss.
template <typename E>
IPO_HOST_DEVICE double loss_of_components(const ComponentArgs& args,
                                          const math::ComponentTotals& totals) {
  using namespace math;
  const auto normalized = [&](component_sum::Row row, const ScalarInput& normalizer) {
    return normalized_loss(totals.sums[row], inverse_normalizer<E>(load_scalar(normalizer)));
  };
  return normalized(component_sum::ce_loss, args.ce_scale) +
         normalized(component_sum::ref_kl_loss, args.ref_kl_scale);
}

template <typename E>
IPO_HOST_DEVICE void store_component_means(const ComponentArgs& args,
                                           const math::ComponentTotals& totals) {
  for (int row = 0; row < math::component_mean::kNumRows; ++row)
    static_cast<E*>(args.means)[row] = static_cast<E>(math::mean_of(totals, row));
}

// Stores the means of segment s.
template <typename E>
IPO_HOST_DEVICE void store_means(const math::SegmentSums& segment, int64_t s, int64_t segments,
                                 void* means) {
  const math::Fractions fractions = math::mean_fractions(segment);
  for (int row = 0; row < math::mean::kNumRows; ++row) {
    static_cast<E*>(means)[row * segments + s] = static_cast<E>(fractions.mean(row));
  }
}

// Stores the sums, extremes and means of segment s.
template <typename E>
IPO_HOST_DEVICE void store_segment(const IpoLossArgs& args, const math::SegmentSums& segment,
                                   int64_t s) {
  const int64_t segments = args.segments.count;
  for (int row = 0; row < math::kNumSumRows; ++row)
    args.sums[row * segments + s] = segment.sums[row];
  for (int row = 0; row < math::extreme::kNumRows; ++row) {
    args.extremes[row * segments + s] = segment.extremes[row];
  }
  store_means<E>(segment, s, segments, args.means);
}

template <typename E>
IPO_HOST_DEVICE void store_statistics(const SequenceStatisticsArgs& args,
                                      const math::SequenceSums<E>& sequence, int64_t s) {
  using namespace math;
  const int64_t segments = args.loss.segments.count;
  for (int k = 0; k < estimator::kNumRows; ++k) {
    args.sums[k * segments + s] = sequence.sums[k];
    args.extremes[k * segments + s] = sequence.smallest[k];
    args.extremes[(estimator::kNumRows + k) * segments + s] = sequence.largest[k];
  }
  args.sums[statistics::kActive * segments + s] = sequence.active;
  args.sums[statistics::kNegative * segments + s] = sequence.negative;
}

// Judges the sequence that segment s is a piece of, by args.sequence_totals.
template <typename E>
IPO_HOST_DEVICE math::SequenceVerdict verdict_on_piece(const IpoLossArgs& args, int64_t s) {
  using namespace math;
  const auto row = [&](int i) { return args.sequence_totals[i * args.segments.count + s]; };
  SequenceSums<E> sequence = {}, piece = {};
  for (int k = 0; k < estimator::kNumRows; ++k) {
    sequence.sums[k] = row(k);
    sequence.smallest[k] = static_cast<E>(row(statistics::kNumSums + k));
    sequence.largest[k] = static_cast<E>(row(statistics::kNumSums + estimator::kNumRows + k));
  }
  sequence.active = static_cast<uint32_t>(row(statistics::kActive));
  sequence.negative = static_cast<uint32_t>(row(statistics::kNegative));
  piece.active = static_cast<uint32_t>(row(statistics::kPieceActive));
  piece.negative = static_cast<uint32_t>(row(statistics::kPieceNegative));
  return judge(sequence, piece, args.sequence_rules, args.params.rollout_low);
}

template <typename E>
IPO_HOST_DEVICE void metric_means_of_segment(const MetricMeansArgs& args, int64_t s) {
  math::SegmentSums segment;
  for (int row = 0; row < math::kNumSumRows; ++row)
    segment.sums[row] = args.sums[row * args.segments + s];
  for (int row = 0; row < math::extreme::kNumRows; ++row) {
    segment.extremes[row] = args.extremes[row * args.segments + s];
  }
  store_means<E>(segment, s, args.segments, args.means);
}

namespace cpu {

size_t workspace_bytes(const IpoLossArgs& args);

// The caller has checked that cu_seqlens is a partition.
void ipo_loss(IpoLossArgs args, const ParallelFor& parallel_for);
void sequence_statistics(SequenceStatisticsArgs args, const ParallelFor& parallel_for);
void metric_means(const MetricMeansArgs& args);
void fold_segments(const FoldArgs& args);

}  // namespace cpu

namespace cuda {

size_t workspace_bytes(const IpoLossArgs& args);

// ipo_loss makes two launches on `stream`, four where sequences are judged (three by totals that it
// is given), without synchronising with the host. The functions return null, or CUDA's words for
// what failed. A cu_seqlens that is no partition makes the loss and every gradient NaN and leaves
// metrics and statistics undefined.
const char* ipo_loss(IpoLossArgs args, CUstream_st* stream);
const char* sequence_statistics(SequenceStatisticsArgs args, CUstream_st* stream);
const char* fold_segments(const FoldArgs& args, CUstream_st* stream);
const char* metric_means(const MetricMeansArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace ipo_ext
