// The loss from log-probabilities on the CPU: fixed tiles in parallel, then their sums in order, so
// that the result does not depend on the number of threads. Threads take fixed groups of tiles; a
// segment that lies in one group is finished with it, the others at the end.
#include "kernels/ipo_loss.h"

#include <algorithm>

#include "kernels/cpu/ipo_loss_simd.h"

namespace ipo_ext::cpu {
namespace {

using math::SegmentSums;
using math::TileSums;

constexpr int64_t kTileSize = 2048;
constexpr int64_t kTilesPerGroup = 4;  // fewer do not pay for waking a thread
constexpr int64_t kGroupSize = kTilesPerGroup * kTileSize;

template <typename E>
using SpanSums = TileSums<E> (*)(const IpoLossArgs&, const math::LossParams<E>&, int64_t begin,
                                 int64_t end, bool& drops_sequence);

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

// Returns how many segments begin before `token`.
int64_t segments_before(const Segments& segments, int64_t token) {
  int64_t low = 0, high = segments.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    segments.begin(middle) < token ? low = middle + 1 : high = middle;
  }
  return low;
}

// Returns the last segment that begins at or before `token`.
int64_t segment_of(const Segments& segments, int64_t token) {
  return segments_before(segments, token + 1) - 1;
}

// Returns the group of tiles that holds all tokens of segment s, or -1. An empty segment belongs to
// the group in which it begins.
int64_t group_of_segment(const Segments& segments, int64_t s) {
  const int64_t group = segments.begin(s) / kGroupSize;
  const bool fits =
      segments.begin(s) < segments.tokens && segments.begin(s + 1) <= (group + 1) * kGroupSize;
  return fits ? group : -1;
}

// Sums a tile's spans. With params.rollout_dropped the tile is run a second time, for the spans of
// dropped sequences.
template <typename E>
void run_tile(const IpoLossArgs& args, const math::LossParams<E>& params, int64_t tile) {
  const Segments& segments = args.segments;
  const SpanSums<E> span_sums = params.rules() == math::Rules::kDefault
                                    ? best_span_sums<math::Rules::kDefault, E>()
                                    : best_span_sums<math::Rules::kAny, E>();
  const Workspace<E> workspace(args);
  const int64_t tile_begin = tile * segments.tile_size;
  const int64_t tile_end = std::min(tile_begin + segments.tile_size, segments.tokens);

  double loss = 0;
  int64_t begin = tile_begin;
  for (int64_t segment = segment_of(segments, tile_begin); begin < tile_end; ++segment) {
    const int64_t end = std::min(segments.begin(segment + 1), tile_end);
    if (end <= begin) continue;
    const int64_t slot = Segments::slot(tile, segment);
    if (!params.rollout_dropped || workspace.rollout_flags[slot]) {
      bool drops_sequence = params.rollout_dropped;
      workspace.slots[slot] = span_sums(args, params, begin, end, drops_sequence);
      if (params.has_rollout_rule) workspace.rollout_flags[slot] = drops_sequence;
    }
    loss += loss_of_span(workspace.slots[slot]);
    begin = end;
  }
  workspace.tile_losses[tile] = loss;
}

template <typename E>
bool rollout_is_dropped(const Workspace<E>& workspace, const Segments& segments, int64_t s) {
  const bool* flags = workspace.rollout_flags;
  return std::any_of(flags + segments.first_slot(s), flags + segments.end_slot(s),
                     [](bool flag) { return flag; });
}

// Takes the flags from the spans that drop their sequence to all spans of it.
template <typename E>
void spread_rollout_flags(const IpoLossArgs& args) {
  const Workspace<E> workspace(args);
  for (int64_t s = 0; s < args.segments.count; ++s) {
    const bool dropped = rollout_is_dropped(workspace, args.segments, s);
    std::fill(workspace.rollout_flags + args.segments.first_slot(s),
              workspace.rollout_flags + args.segments.end_slot(s), dropped);
  }
}

template <typename E>
void finish_segment(const IpoLossArgs& args, int64_t s) {
  const Workspace<E> workspace(args);
  SegmentSums total = math::empty_segment_sums();
  for (int64_t slot = args.segments.first_slot(s); slot < args.segments.end_slot(s); ++slot) {
    total = math::merge(total, math::to_segment_sums(workspace.slots[slot]));
  }
  if (args.params.has_rollout_rule && rollout_is_dropped(workspace, args.segments, s))
    math::mark_dropped_rollout(total);
  store_segment<E>(args, total, s);
}

template <typename E>
void run_group(const IpoLossArgs& args, const math::LossParams<E>& params, int64_t group) {
  const Segments& segments = args.segments;
  const int64_t first_tile = group * kTilesPerGroup;
  const int64_t end_tile = std::min(first_tile + kTilesPerGroup, segments.num_tiles());
  for (int64_t tile = first_tile; tile < end_tile; ++tile) run_tile<E>(args, params, tile);

  if (params.has_rollout_rule && !params.rollout_dropped) return;  // sums are not final
  int64_t s = segments_before(segments, group * kGroupSize);
  for (; s < segments.count && group_of_segment(segments, s) == group; ++s) {
    finish_segment<E>(args, s);
  }
}

template <typename E>
void run(const IpoLossArgs& args, const ParallelFor& parallel_for) {
  math::LossParams<E> params = params_for<E>(args);
  const int64_t tiles = args.segments.num_tiles();
  const auto run_groups = [&] {
    const int64_t groups = (tiles + kTilesPerGroup - 1) / kTilesPerGroup;
    parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) run_group<E>(args, params, group);
    });
  };
  run_groups();
  if (params.has_rollout_rule) {
    spread_rollout_flags<E>(args);
    params.rollout_dropped = true;
    run_groups();
  }

  const Workspace<E> workspace(args);
  double loss = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) loss += workspace.tile_losses[tile];
  *static_cast<E*>(args.loss) =
      static_cast<E>(normalized_loss(loss, inverse_normalizer_of<E>(args)));
  for (int64_t s = 0; s < args.segments.count; ++s) {
    if (group_of_segment(args.segments, s) < 0) finish_segment<E>(args, s);
  }
}

}  // namespace

size_t workspace_bytes(const IpoLossArgs& args) {
  Segments segments = args.segments;
  segments.tile_size = kTileSize;
  return dispatch_compute(args.compute_dtype, [&](auto compute) {
    return Workspace<TypeOf<decltype(compute)>>::bytes(args, segments);
  });
}

void ipo_loss(IpoLossArgs args, const ParallelFor& parallel_for) {
  args.segments.tile_size = kTileSize;
  dispatch_compute(args.compute_dtype,
                   [&](auto compute) { run<TypeOf<decltype(compute)>>(args, parallel_for); });
}

void metric_means(const MetricMeansArgs& args) {
  dispatch_compute(args.compute_dtype, [&](auto compute) {
    for (int64_t s = 0; s < args.segments; ++s)
      metric_means_of_segment<TypeOf<decltype(compute)>>(args, s);
  });
}

}  // namespace ipo_ext::cpu
