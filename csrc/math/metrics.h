// The metrics: what a token adds to each sum, how sums merge, and which means are made of them.
// Sums are fp64 and counts exact, so that segments, micro-batches and ranks combine without bias.
#pragma once

#include <limits>

#include "math/lanes.h"
#include "math/token_loss.h"

namespace ipo_ext::math {

// The rows of the operator's `sums`: counts first, then real-valued sums, then what only a whole
// segment knows. Python reads the names from these lists.
#define IPO_EXT_COUNT_ROWS(X)  \
  X(active)                    \
  X(kept)                      \
  X(masked_low)                \
  X(masked_high)               \
  X(nonfinite)                 \
  X(masked_advantage_positive) \
  X(masked_advantage_negative)

#define IPO_EXT_SUM_ROWS(X) \
  X(mismatch_kl_kept)       \
  X(mismatch_kl_masked)     \
  X(pg_loss)                \
  X(kl_loss)                \
  X(ratio)                  \
  X(ratio_squared)          \
  X(teacher_kl)             \
  X(entropy)

#define IPO_EXT_SEGMENT_ROWS(X) \
  X(rollout_dropped)            \
  X(sequence_dropped)           \
  X(is_clipped)                 \
  X(ratio_capped)

// The rows of the operator's `extremes`, which are members of TileSums.
#define IPO_EXT_EXTREME_ROWS(X) \
  X(log_ratio_min)              \
  X(log_ratio_max)

// The rows of the operator's `means`, which users read: X(name, numerator, denominator), of the
// rows above by their names. `masked` is active - kept; `measured` is 0 where no log-ratio was.
#define IPO_EXT_MEAN_ROWS(X)                                      \
  X(mismatch_kl, mismatch_kl_kept + mismatch_kl_masked, active)   \
  X(masked_mismatch_kl, mismatch_kl_masked, masked)               \
  X(unmasked_mismatch_kl, mismatch_kl_kept, kept)                 \
  X(is_masked, masked, active)                                    \
  X(is_masked_low, masked_low, active)                            \
  X(is_masked_high, masked_high, active)                          \
  X(teacher_kl, teacher_kl, active)                               \
  X(pg_loss, pg_loss, active)                                     \
  X(kl_loss, kl_loss, active)                                     \
  X(nonfinite, nonfinite, active)                                 \
  X(rollout_dropped, rollout_dropped, active)                     \
  X(masked_advantage_positive, masked_advantage_positive, masked) \
  X(masked_advantage_negative, masked_advantage_negative, masked) \
  X(ess, (ratio * ratio), (kept * ratio_squared))                 \
  X(log_ratio_min, log_ratio_min, measured)                       \
  X(log_ratio_max, log_ratio_max, measured)                       \
  X(entropy, entropy, active)                                     \
  X(sequence_dropped, sequence_dropped, active)                   \
  X(is_clipped, is_clipped, active)                               \
  X(ratio_capped, ratio_capped, active)

#define IPO_EXT_ENUMERATOR(name, ...) name,
namespace count {
enum Row : int { IPO_EXT_COUNT_ROWS(IPO_EXT_ENUMERATOR) kNumRows };
}
namespace sum {
enum Row : int { IPO_EXT_SUM_ROWS(IPO_EXT_ENUMERATOR) kNumRows };
}
namespace of_segment {
enum Row : int { IPO_EXT_SEGMENT_ROWS(IPO_EXT_ENUMERATOR) kNumRows };
}
namespace extreme {
enum Row : int { IPO_EXT_EXTREME_ROWS(IPO_EXT_ENUMERATOR) kNumRows };
}
namespace mean {
enum Row : int { IPO_EXT_MEAN_ROWS(IPO_EXT_ENUMERATOR) kNumRows };
}
#undef IPO_EXT_ENUMERATOR

constexpr int kFirstSegmentRow = count::kNumRows + sum::kNumRows;
constexpr int kNumSumRows = kFirstSegmentRow + of_segment::kNumRows;

// Sums over the tokens of a span. T is a scalar or, while a SIMD loop runs, a vector.
template <typename T>
struct TileSums {
  Wide<T> sums[sum::kNumRows];
  typename Lanes<T>::Count counts[count::kNumRows];
  T log_ratio_min;  // +inf over nothing
  T log_ratio_max;  // -inf over nothing
};

template <typename T>
IPO_HOST_DEVICE TileSums<T> empty_tile_sums() {
  TileSums<T> empty = {};
  empty.log_ratio_min = splat<T>(std::numeric_limits<Element<T>>::infinity());
  empty.log_ratio_max = splat<T>(-std::numeric_limits<Element<T>>::infinity());
  return empty;
}

// Adds a token to the sums. A ratio that overflows counts in `nonfinite` (and in the band's sides)
// and adds 0 to everything else.
template <Tokens kTokens = Tokens::kAny, typename T>
IPO_HOST_DEVICE void add_token(TileSums<T>& tile, const Token<T>& token, const TokenLoss<T>& loss) {
  using E = Element<T>;
  using L = Lanes<T>;
  const Mask<T> counted = loss.active & loss.finite;
  const Mask<T> masked = L::and_not(counted, loss.kept);

  constexpr bool kIsTame = kTokens == Tokens::kTame;
  count_where<T>(tile.counts[count::active], loss.active);
  count_where<T>(tile.counts[count::kept], loss.kept);
  count_where<T>(tile.counts[count::masked_low], loss.masked_low);
  count_where<T>(tile.counts[count::masked_high], loss.masked_high);
  if constexpr (!kIsTame) {
    count_where<T>(tile.counts[count::nonfinite], L::and_not(loss.active, loss.finite));
  }
  count_where<T>(tile.counts[count::masked_advantage_positive], masked & (token.advantage > E(0)));
  count_where<T>(tile.counts[count::masked_advantage_negative], masked & (token.advantage < E(0)));

  const Wide<T> ratio = L::widen(loss.ratio);
  const T kept_mismatch = select<T>(loss.kept, loss.mismatch_kl, T{});
  // Of tame tokens the inactive have a mismatch of 0.
  const T masked_mismatch =
      kIsTame ? loss.mismatch_kl - kept_mismatch : select<T>(masked, loss.mismatch_kl, T{});
  tile.sums[sum::mismatch_kl_kept] += L::widen(kept_mismatch);
  tile.sums[sum::mismatch_kl_masked] += L::widen(masked_mismatch);
  tile.sums[sum::pg_loss] += L::widen(loss.pg_loss);
  tile.sums[sum::kl_loss] += L::widen(loss.kl_loss);
  tile.sums[sum::ratio] += ratio;
  tile.sums[sum::ratio_squared] += ratio * ratio;

  // A finite x counts even where its ratio overflows.
  Mask<T> measurable = loss.active;
  if constexpr (!kIsTame) {
    measurable = loss.active & (loss.log_ratio >= -std::numeric_limits<E>::max()) &
                 (loss.log_ratio <= std::numeric_limits<E>::max());
  }
  lower_where<T>(tile.log_ratio_min, measurable, loss.log_ratio);
  raise_where<T>(tile.log_ratio_max, measurable, loss.log_ratio);
}

// Says which optional inputs of a token are there.
struct TokenExtras {
  bool teacher;
  bool entropy;
};

// Adds the optional inputs of a token that is `counted`: active, with a finite ratio.
template <typename T>
IPO_HOST_DEVICE void add_extras(TileSums<T>& tile, const Token<T>& token, Mask<T> counted,
                                const TokenExtras& has) {
  using L = Lanes<T>;
  if (has.teacher) {
    tile.sums[sum::teacher_kl] +=
        L::widen(select<T>(counted, token.teacher_logprob - token.trainer_logprob, T{}));
  }
  if (has.entropy) tile.sums[sum::entropy] += L::widen(select<T>(counted, token.entropy, T{}));
}

// Sums over a whole segment, all in fp64, as the operator returns them.
struct SegmentSums {
  double sums[kNumSumRows];
  double extremes[extreme::kNumRows];  // +inf and -inf over nothing
};

IPO_HOST_DEVICE SegmentSums empty_segment_sums() {
  SegmentSums empty = {};
  empty.extremes[extreme::log_ratio_min] = std::numeric_limits<double>::infinity();
  empty.extremes[extreme::log_ratio_max] = -std::numeric_limits<double>::infinity();
  return empty;
}

IPO_HOST_DEVICE SegmentSums merge(SegmentSums a, const SegmentSums& b) {
  for (int row = 0; row < kNumSumRows; ++row) a.sums[row] += b.sums[row];
  a.extremes[extreme::log_ratio_min] =
      smaller(a.extremes[extreme::log_ratio_min], b.extremes[extreme::log_ratio_min]);
  a.extremes[extreme::log_ratio_max] =
      larger(a.extremes[extreme::log_ratio_max], b.extremes[extreme::log_ratio_max]);
  return a;
}

template <typename E>
IPO_HOST_DEVICE SegmentSums to_segment_sums(const TileSums<E>& tile) {
  SegmentSums segment = {};
  for (int row = 0; row < count::kNumRows; ++row) segment.sums[row] = tile.counts[row];
  for (int row = 0; row < sum::kNumRows; ++row)
    segment.sums[count::kNumRows + row] = tile.sums[row];
  segment.extremes[extreme::log_ratio_min] = tile.log_ratio_min;
  segment.extremes[extreme::log_ratio_max] = tile.log_ratio_max;
  return segment;
}

// How many tokens of a span the policy form bounds: counted apart, since the default has no bounds.
template <typename T>
struct BoundCounts {
  typename Lanes<T>::Count clipped;
  typename Lanes<T>::Count capped;
};

template <typename T>
IPO_HOST_DEVICE void add_token(BoundCounts<T>& counts, const TokenLoss<T>& loss) {
  count_where<T>(counts.clipped, loss.clipped);
  count_where<T>(counts.capped, loss.capped);
}

template <typename E>
IPO_HOST_DEVICE BoundCounts<E> merge(const BoundCounts<E>& a, const BoundCounts<E>& b) {
  return {a.clipped + b.clipped, a.capped + b.capped};
}

// Sets the rows that only a whole segment knows.
template <typename E>
IPO_HOST_DEVICE void set_segment_rows(SegmentSums& segment, const SequenceVerdict& verdict,
                                      const BoundCounts<E>& bounded) {
  double* rows = segment.sums + kFirstSegmentRow;
  rows[of_segment::rollout_dropped] = verdict.rollout_dropped ? segment.sums[count::active] : 0;
  rows[of_segment::sequence_dropped] = verdict.dropped_tokens;
  rows[of_segment::is_clipped] = bounded.clipped;
  rows[of_segment::ratio_capped] = bounded.capped;
}

// A mean over nothing is defined as 0.
IPO_HOST_DEVICE double ratio_or_zero(double numerator, double denominator) {
  return denominator == 0 ? 0 : numerator / denominator;
}

// The means as quotients, so that the threads of a GPU divide side by side: a division in fp64 is
// slow.
struct Fractions {
  double numerators[mean::kNumRows];
  double denominators[mean::kNumRows];

  IPO_HOST_DEVICE void set(mean::Row row, double numerator, double denominator) {
    numerators[row] = numerator;
    denominators[row] = denominator;
  }
  IPO_HOST_DEVICE double mean(int row) const {
    return ratio_or_zero(numerators[row], denominators[row]);
  }
};

// Each row of a segment under its name.
#define IPO_EXT_COUNT(name) [[maybe_unused]] const double& name = counts[count::name];
#define IPO_EXT_SUM(name) [[maybe_unused]] const double& name = sums[sum::name];
#define IPO_EXT_OF_SEGMENT(name) [[maybe_unused]] const double& name = of_whole[of_segment::name];
#define IPO_EXT_EXTREME(name) [[maybe_unused]] const double& name = segment.extremes[extreme::name];
#define IPO_EXT_MEAN(name, numerator, denominator) means.set(mean::name, numerator, denominator);

IPO_HOST_DEVICE Fractions mean_fractions(const SegmentSums& segment) {
  const double* counts = segment.sums;
  const double* sums = segment.sums + count::kNumRows;
  const double* of_whole = segment.sums + kFirstSegmentRow;
  IPO_EXT_COUNT_ROWS(IPO_EXT_COUNT)
  IPO_EXT_SUM_ROWS(IPO_EXT_SUM)
  IPO_EXT_SEGMENT_ROWS(IPO_EXT_OF_SEGMENT)
  IPO_EXT_EXTREME_ROWS(IPO_EXT_EXTREME)
  const double masked = active - kept;
  const double measured = log_ratio_min <= log_ratio_max;

  Fractions means;
  IPO_EXT_MEAN_ROWS(IPO_EXT_MEAN)
  return means;
}

#undef IPO_EXT_MEAN
#undef IPO_EXT_EXTREME
#undef IPO_EXT_OF_SEGMENT
#undef IPO_EXT_SUM
#undef IPO_EXT_COUNT

}  // namespace ipo_ext::math
