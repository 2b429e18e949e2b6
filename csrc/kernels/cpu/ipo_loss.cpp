// The loss from log-probabilities on the CPU: fixed tiles in parallel, then their sums in order, so
// that the result does not depend on the number of threads. Threads take fixed groups of tiles; a
// segment that lies in one group is finished with it, the others at the end. Where sequences are
// judged, their log-ratios are read first.
#include "kernels/ipo_loss.h"

#include <algorithm>

#include "kernels/cpu/ipo_loss_simd.h"
#include "kernels/cpu/spans.h"

namespace ipo_ext::cpu {
namespace {

using math::SegmentSums;
using math::TileSums;

constexpr int kTileLog2 = 11;
constexpr int64_t kTileSize = int64_t{1} << kTileLog2;
constexpr int64_t kTilesPerGroup = 4;  // fewer do not pay for waking a thread
constexpr int64_t kGroupSize = kTilesPerGroup * kTileSize;

template <typename E>
using SpanSums = TileSums<E> (*)(const IpoLossArgs&, const math::LossParams<E>&, int64_t begin,
                                 int64_t end, math::BoundCounts<E>& bounded);
template <typename E>
using SequenceSpanSums = math::SequenceSums<E> (*)(const IpoLossArgs&, int64_t begin, int64_t end);
using AddComponents = math::ComponentTotals (*)(const IpoLossArgs&, int64_t begin, int64_t end);

template <math::Rules kRules, typename E>
SpanSums<E> best_span_sums();
#define IPO_EXT_CHOOSE_SPAN_SUMS(name, kRules, E)         \
  template <>                                             \
  SpanSums<E> best_span_sums<kRules, E>() {               \
    static const SpanSums<E> best = IPO_EXT_CHOOSE(name); \
    return best;                                          \
  }
IPO_EXT_SPAN_SUMS(IPO_EXT_CHOOSE_SPAN_SUMS)
#undef IPO_EXT_CHOOSE_SPAN_SUMS

template <typename E>
SequenceSpanSums<E> best_sequence_sums();
#define IPO_EXT_CHOOSE_SEQUENCE_SUMS(name, E)                     \
  template <>                                                     \
  SequenceSpanSums<E> best_sequence_sums<E>() {                   \
    static const SequenceSpanSums<E> best = IPO_EXT_CHOOSE(name); \
    return best;                                                  \
  }
IPO_EXT_SEQUENCE_SUMS(IPO_EXT_CHOOSE_SEQUENCE_SUMS)
#undef IPO_EXT_CHOOSE_SEQUENCE_SUMS

template <typename E>
AddComponents best_add_components();
#define IPO_EXT_CHOOSE_ADD_COMPONENTS(name, E)              \
  template <>                                               \
  AddComponents best_add_components<E>() {                  \
    static const AddComponents best = IPO_EXT_CHOOSE(name); \
    return best;                                            \
  }
IPO_EXT_ADD_COMPONENTS(IPO_EXT_CHOOSE_ADD_COMPONENTS)
#undef IPO_EXT_CHOOSE_ADD_COMPONENTS

// Returns the group of tiles that holds all tokens of segment s, or -1. An empty segment belongs to
// the group in which it begins.
int64_t group_of_segment(const Segments& segments, int64_t s) {
  const int64_t group = segments.begin(s) / kGroupSize;
  const bool fits =
      segments.begin(s) < segments.tokens && segments.begin(s + 1) <= (group + 1) * kGroupSize;
  return fits ? group : -1;
}

template <typename E>
void run_tile(const IpoLossArgs& args, math::LossParams<E> params, int64_t tile) {
  const SpanSums<E> span_sums = params.rules() == math::Rules::kDefault
                                    ? best_span_sums<math::Rules::kDefault, E>()
                                    : best_span_sums<math::Rules::kAny, E>();
  const Workspace<E> workspace(args);
  double loss = 0;
  for_each_span(args.segments, tile, [&](int64_t segment, int64_t begin, int64_t end) {
    const int64_t slot = Segments::slot(tile, segment);
    if (params.judges_sequences) params.sequence = workspace.verdicts[segment];
    math::BoundCounts<E> bounded = {};
    workspace.slots[slot] = span_sums(args, params, begin, end, bounded);
    if (params.rules() == math::Rules::kAny) workspace.bound_counts[slot] = bounded;
    loss += loss_of_span(workspace.slots[slot]);
  });
  workspace.tile_losses[tile] = loss;
  if (!args.components.are_wanted()) return;
  const int64_t begin = tile * kTileSize;
  const int64_t end = std::min(begin + kTileSize, args.segments.tokens);
  workspace.components[tile] = best_add_components<E>()(args, begin, end);
}

template <typename E>
void sum_sequences_of_tile(const IpoLossArgs& args, int64_t tile) {
  const Workspace<E> workspace(args);
  for_each_span(args.segments, tile, [&](int64_t segment, int64_t begin, int64_t end) {
    workspace.sequence_slots[Segments::slot(tile, segment)] =
        best_sequence_sums<E>()(args, begin, end);
  });
}

template <typename E>
void sum_sequences(const IpoLossArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.segments.num_tiles(), kTilesPerGroup, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) sum_sequences_of_tile<E>(args, tile);
  });
}

template <typename E>
math::SequenceSums<E> sums_of_sequence(const IpoLossArgs& args, int64_t s) {
  const Workspace<E> workspace(args);
  auto sequence = math::empty_sequence_sums<E>();
  for (int64_t slot = args.segments.first_slot(s); slot < args.segments.end_slot(s); ++slot)
    sequence = math::merge(sequence, workspace.sequence_slots[slot]);
  return sequence;
}

template <typename E>
math::SequenceVerdict verdict_on(const IpoLossArgs& args, int64_t s) {
  if (args.sequence_totals != nullptr) return verdict_on_piece<E>(args, s);
  return math::judge(sums_of_sequence<E>(args, s), args.sequence_rules, args.params.rollout_low);
}

template <typename E>
void finish_segment(const IpoLossArgs& args, int64_t s) {
  const Workspace<E> workspace(args);
  const bool is_default = args.params.rules() == math::Rules::kDefault;
  SegmentSums total = math::empty_segment_sums();
  math::BoundCounts<E> bounded = {};
  for (int64_t slot = args.segments.first_slot(s); slot < args.segments.end_slot(s); ++slot) {
    total = math::merge(total, math::to_segment_sums(workspace.slots[slot]));
    if (!is_default) bounded = math::merge(bounded, workspace.bound_counts[slot]);
  }
  const bool judged = args.params.judges_sequences;
  const auto verdict = judged ? workspace.verdicts[s] : math::SequenceVerdict{};
  math::set_segment_rows(total, verdict, bounded);
  store_segment<E>(args, total, s);
}

template <typename E>
void run_group(const IpoLossArgs& args, const math::LossParams<E>& params, int64_t group) {
  const Segments& segments = args.segments;
  const int64_t first_tile = group * kTilesPerGroup;
  const int64_t end_tile = std::min(first_tile + kTilesPerGroup, segments.num_tiles());
  for (int64_t tile = first_tile; tile < end_tile; ++tile) run_tile<E>(args, params, tile);
  int64_t s = segments.first_from(group * kGroupSize);
  for (; s < segments.count && group_of_segment(segments, s) == group; ++s) {
    finish_segment<E>(args, s);
  }
}

// Makes the verdicts, which the tokens' loss asks for: a pass of its own over the log-ratios,
// unless totals tell.
template <typename E>
void judge_sequences(const IpoLossArgs& args, const ParallelFor& parallel_for) {
  if (args.sequence_totals == nullptr) sum_sequences<E>(args, parallel_for);
  const Workspace<E> workspace(args);
  for (int64_t s = 0; s < args.segments.count; ++s) workspace.verdicts[s] = verdict_on<E>(args, s);
}

// Stores the components' metrics and returns what they add to the loss.
template <typename E>
double finish_components(const IpoLossArgs& args) {
  const Workspace<E> workspace(args);
  math::ComponentTotals totals = {};
  for (int64_t tile = 0; tile < args.segments.num_tiles(); ++tile)
    totals = math::merge(totals, workspace.components[tile]);
  store_component_means<E>(args.components, totals);
  return loss_of_components<E>(args.components, totals);
}

template <typename E>
void run(const IpoLossArgs& args, const ParallelFor& parallel_for) {
  const math::LossParams<E> params = params_for<E>(args);
  const int64_t tiles = args.segments.num_tiles();
  if (params.judges_sequences) judge_sequences<E>(args, parallel_for);
  const int64_t groups = (tiles + kTilesPerGroup - 1) / kTilesPerGroup;
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) run_group<E>(args, params, group);
  });

  const Workspace<E> workspace(args);
  double loss = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) loss += workspace.tile_losses[tile];
  loss = normalized_loss(loss, inverse_normalizer_of<E>(args));
  if (args.components.are_wanted()) loss += finish_components<E>(args);
  *static_cast<E*>(args.loss) = static_cast<E>(loss);
  for (int64_t s = 0; s < args.segments.count; ++s) {
    if (group_of_segment(args.segments, s) < 0) finish_segment<E>(args, s);
  }
}

}  // namespace

size_t workspace_bytes(const IpoLossArgs& args) {
  Segments segments = args.segments;
  segments.tile_log2 = kTileLog2;
  return dispatch_compute(args.compute_dtype, [&](auto compute) {
    return Workspace<TypeOf<decltype(compute)>>::bytes(args, segments, segments);
  });
}

void ipo_loss(IpoLossArgs args, const ParallelFor& parallel_for) {
  args.segments.tile_log2 = kTileLog2;
  dispatch_compute(args.compute_dtype,
                   [&](auto compute) { run<TypeOf<decltype(compute)>>(args, parallel_for); });
}

void sequence_statistics(SequenceStatisticsArgs args, const ParallelFor& parallel_for) {
  args.loss.segments.tile_log2 = kTileLog2;
  dispatch_compute(args.loss.compute_dtype, [&](auto compute) {
    using E = TypeOf<decltype(compute)>;
    sum_sequences<E>(args.loss, parallel_for);
    for (int64_t s = 0; s < args.loss.segments.count; ++s)
      store_statistics<E>(args, sums_of_sequence<E>(args.loss, s), s);
  });
}

void fold_segments(const FoldArgs& args) {
  for (int i = 0; i < args.num_rows(); ++i) {
    const FoldedRow row = folded_row(args, i);
    std::fill_n(row.folded, args.sequences, row.nothing());
    for (int64_t s = 0; s < args.segments; ++s) {
      const int64_t id = args.sequence_ids[s];
      if (id >= 0 && id < args.sequences)
        row.folded[id] = row.combine(row.folded[id], row.values[s]);
    }
  }
}

void metric_means(const MetricMeansArgs& args) {
  dispatch_compute(args.compute_dtype, [&](auto compute) {
    for (int64_t s = 0; s < args.segments; ++s)
      metric_means_of_segment<TypeOf<decltype(compute)>>(args, s);
  });
}

}  // namespace ipo_ext::cpu
