// Rows of logits on the CPU: a SIMD loop over each of a row's passes (maximum, sums,
// gradient), between which the row stays in the cache. Memory is waited for in none of them: the
// pass of exponentials, which is all arithmetic, fetches what the others will need. Compiled once
// for each instruction set (IPO_EXT_CPU_ARCH names it), chosen at run time in logits.cpp; ragged
// tails run the same vector code, padded with logits of -inf.
#include "kernels/cpu/logits_simd.h"

#include <type_traits>

#include "kernels/cpu/simd_memory.h"

#define IPO_EXT_INLINE inline __attribute__((always_inline))

namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH {
namespace {

using namespace ipo_ext::math;

constexpr int64_t kChunk = 512;        // columns that are staged at once
constexpr int64_t kFetchedBytes = 64;  // by one prefetch: a cache line
constexpr int kUnroll = 4;             // vectors side by side, to hide the latency of their chains

template <typename E>
constexpr int64_t kPaddedTo = kUnroll * kLanesOf<Vector<E>>;

// Calls body(begin, count) for the chunks of a row.
template <typename Body>
IPO_EXT_INLINE void for_each_chunk(int64_t columns, const Body& body) {
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    body(begin, columns - begin < kChunk ? columns - begin : kChunk);
  }
}

// Asks for a row's columns, to be read or written soon, and does not wait for them.
template <typename Stored>
IPO_EXT_INLINE void fetch(const Stored* row, int64_t begin, int64_t count) {
  if (row == nullptr) return;
  constexpr int64_t kColumns = kFetchedBytes / sizeof(Stored);
  for (int64_t i = 0; i < count; i += kColumns) __builtin_prefetch(row + begin + i);
}

template <typename E>
IPO_EXT_INLINE void pad(E* staged, int64_t count) {
  for (int64_t i = count; i % kPaddedTo<E> != 0; ++i)
    staged[i] = -std::numeric_limits<E>::infinity();
}

// Returns columns [begin, begin + count) as E, padded with logits of -inf: the row itself where it
// can be used as it is, else `staged`.
template <typename E, typename Stored>
IPO_EXT_INLINE const E* stage(const Stored* row, int64_t begin, int64_t count, E* staged) {
  if constexpr (std::is_same_v<E, Stored>) {
    if (count == kChunk) return row + begin;
  }
  for (int64_t i = 0; i < count; ++i) staged[i] = convert<E>(load_one(row + begin + i));
  pad(staged, count);
  return staged;
}

// Returns what stage() does, capped; the padding too is -inf afterwards. Where there is a softcap,
// its derivatives go to `derivatives`.
template <typename E, typename Stored>
IPO_EXT_INLINE const E* stage_capped(const Stored* row, int64_t begin, int64_t count, E softcap,
                                     E* staged, E* derivatives) {
  using T = Vector<E>;
  const E* logits = stage<E>(row, begin, count, staged);
  if (softcap == 0) return logits;
  for (int64_t i = 0; i < count; i += kLanesOf<T>) {
    const CappedLogit<T> capped = cap_logit(load<T>(logits + i), softcap);
    store(staged + i, capped.value);
    store(derivatives + i, capped.derivative);
  }
  pad(staged, count);
  return staged;
}

// Returns a row's maximum. NaNs are passed over: they show in the sums.
template <typename E, typename Stored>
IPO_EXT_INLINE E max_logit(const Stored* row, int64_t columns) {
  using T = Vector<E>;
  T maxima[kUnroll];
  for (T& maximum : maxima) maximum = splat<T>(-std::numeric_limits<E>::infinity());
  alignas(64) E staged[kChunk];
  for_each_chunk(columns, [&](int64_t begin, int64_t count) {
    const E* logits = stage<E>(row, begin, count, staged);
    for (int64_t i = 0; i < count; i += kPaddedTo<E>) {
      for (int k = 0; k < kUnroll; ++k) {
        const T z = load<T>(logits + i + k * kLanesOf<T>);
        maxima[k] = select<T>(z > maxima[k], z, maxima[k]);
      }
    }
  });
  E lanes[kPaddedTo<E>];
  memcpy(lanes, maxima, sizeof(lanes));
  E result = lanes[0];
  for (const E lane : lanes) result = lane > result ? lane : result;
  return result;
}

template <typename T>
IPO_EXT_INLINE double sum_of_lanes(const Wide<T>& wide) {
  double lanes[sizeof(wide) / sizeof(double)];
  memcpy(lanes, &wide, sizeof(wide));
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// Returns the row's sums, made in the compute dtype within a chunk and in fp64 beyond. Where `kept`
// is not null, and it may be the row itself, the exponentials are kept there, times du/dz. The two
// other rows are prefetched.
template <typename E, typename Stored, typename Gradient>
IPO_EXT_INLINE RowSums row_sums(const Stored* row, int64_t columns,
                                const LogitScale<E>& shared_scale, E shared_row_max, E* kept,
                                const Stored* next_row, const Gradient* gradient) {
  using T = Vector<E>;
  Wide<T> sum_exp = {}, sum_exp_x = {};
  alignas(64) E staged[kChunk];
  alignas(64) E derivatives[kChunk];
  alignas(64) E ragged[kChunk];
  for_each_chunk(columns, [&](int64_t begin, int64_t count) {
    fetch(next_row, begin, count);
    fetch(gradient, begin, count);
    const LogitScale<E> scale =
        shared_scale;  // copies, which no store can change: they stay in registers
    const E row_max = shared_row_max;
    const E* capped = stage_capped(row, begin, count, scale.softcap, staged, derivatives);
    E* keep = kept != nullptr && count == kChunk ? kept + begin : ragged;
    T chunk_sum_exp = {}, chunk_sum_exp_x = {};
    for (int64_t i = 0; i < count; i += kLanesOf<T>) {
      const RowTerm<T> term = row_term(load<T>(capped + i), row_max, scale.inverse_temperature);
      chunk_sum_exp += term.exp;
      chunk_sum_exp_x += exp_x(term);
      if (kept == nullptr) continue;
      const bool is_capped = scale.softcap != 0;
      store(keep + i, is_capped ? term.exp * load<T>(derivatives + i) : term.exp);
    }
    if (kept != nullptr && keep == ragged) memcpy(kept + begin, ragged, count * sizeof(E));
    sum_exp += Lanes<T>::widen(chunk_sum_exp);
    sum_exp_x += Lanes<T>::widen(chunk_sum_exp_x);
  });
  return {sum_of_lanes<T>(sum_exp), sum_of_lanes<T>(sum_exp_x)};
}

// Computes a row's derivative by `count` columns from their logits.
template <typename E>
IPO_EXT_INLINE void derive(const E* logits, int64_t count, const LogitScale<E> scale, E row_max,
                           const RowDerivative<E> derivative, E* out) {
  using T = Vector<E>;
  for (int64_t i = 0; i < count; i += kLanesOf<T>) {
    const CappedLogit<T> capped = cap_logit(load<T>(logits + i), scale.softcap);
    const RowTerm<T> term = row_term(capped.value, row_max, scale.inverse_temperature);
    store(out + i, derivative.other(term, capped.derivative));
  }
}

// Computes a row's derivative from kept exponentials, where nothing else enters: no entropy.
template <typename E>
IPO_EXT_INLINE void derive_from_kept(const E* exponentials, int64_t count,
                                     const RowDerivative<E> derivative, E* out) {
  using T = Vector<E>;
  for (int64_t i = 0; i < count; i += kLanesOf<T>) {
    const RowTerm<T> term = {T{}, load<T>(exponentials + i)};
    store(out + i, derivative.other(term, splat<T>(E(1))));
  }
}

// Writes a row's gradient. It may lie over the row or over `kept`, and be narrower than the row:
// columns are read before they are written over.
template <typename E, typename Stored, typename Gradient>
IPO_EXT_INLINE void write_gradient(const Stored* row, int64_t columns, const LogitScale<E>& scale,
                                   E row_max, const RowDerivative<E>& derivative, const E* kept,
                                   const Stored* next_row, Gradient* gradient) {
  alignas(64) E staged[kChunk];
  alignas(64) E derived[kChunk];
  for_each_chunk(columns, [&](int64_t begin, int64_t count) {
    E* out = derived;
    if constexpr (std::is_same_v<E, Gradient>) {
      if (count == kChunk) out = gradient + begin;
    }
    if (kept != nullptr) {
      derive_from_kept(stage<E>(kept, begin, count, staged), count, derivative, out);
    } else {
      fetch(next_row, begin, count);
      derive(stage<E>(row, begin, count, staged), count, scale, row_max, derivative, out);
    }
    if (out == derived) {
      for (int64_t i = 0; i < count; ++i) {
        store_one(gradient + begin + i, narrow<Gradient>(derived[i]));
      }
    }
  });
}

// Returns where the exponentials are kept: in the gradient's place if they fit there, else in
// scratch; nowhere if the gradient is not wanted.
template <typename E, typename Gradient>
IPO_EXT_INLINE E* place_to_keep(Gradient* gradient, E* scratch) {
  if (gradient == nullptr) return nullptr;
  if constexpr (std::is_same_v<E, Gradient>) return gradient;
  return scratch;
}

// Runs one row; next_row is what this thread will read then, or null.
template <typename E, typename Stored, typename Gradient>
IPO_EXT_INLINE void run_row(const LogitsArgs& args, int64_t index, const Stored* next_row,
                            E* scratch) {
  const int64_t columns = args.logits.columns;
  const Stored* row = args.logits.row<Stored>(index);
  Gradient* gradient = args.gradient.data != nullptr ? args.gradient.row<Gradient>(index) : nullptr;

  bool flows = row_is_active(args, index);
  if (flows && is_backward(args)) flows = !upstream_grads<E>(args, index).are_zero();
  if (!flows) {
    fill_results(args, index, E(0));
    if (gradient != nullptr) {
      fill_scale<Gradient>(args, index);
      memset(gradient, 0, columns * sizeof(Gradient));
    }
    return;
  }

  const int64_t label = label_of(args, index);
  const LogitScale<E> scale = scale_of<E>(args, index);
  // The label is read before anything is written: the gradient may lie over the row.
  const bool has_label = label < columns;
  CappedLogit<E> at_label = {};
  if (has_label) at_label = cap_logit(convert<E>(load_one(row + label)), scale.softcap);
  E row_max;
  RowDerivative<E> derivative;
  E* kept = nullptr;
  if (is_backward(args)) {
    row_max = saved_row_max<E>(args, index);
    derivative = restore_row<Gradient>(args, index, true, upstream_grads<E>(args, index));
  } else {
    row_max = cap_logit(max_logit<E>(row, columns), scale.softcap).value;
    kept = place_to_keep(gradient, scratch);
    const RowSums sums = row_sums(row, columns, scale, row_max, kept, next_row, gradient);
    derivative = finish_row<Gradient>(args, index, sums, row_max, at_label.value);
  }
  if (gradient == nullptr) return;
  if (derivative.grads.are_zero()) {
    memset(gradient, 0, columns * sizeof(Gradient));
    return;
  }
  write_gradient(row, columns, scale, row_max, derivative, kept, next_row, gradient);
  if (!has_label) return;
  const RowTerm<E> term = row_term(at_label.value, row_max, scale.inverse_temperature);
  store_one(gradient + label, narrow<Gradient>(derivative.label(term, at_label.derivative)));
}

// Reduces one row, as run_row() does before it finishes it, for what combines with other columns.
template <typename E, typename Stored>
IPO_EXT_INLINE void reduce_row(const LogitsArgs& args, int64_t index, const Stored* next_row) {
  if (!row_is_active(args, index)) return;
  const int64_t columns = args.logits.columns;
  const Stored* row = args.logits.row<Stored>(index);
  const Stored* no_gradient = nullptr;
  E* keeps_nothing = nullptr;
  const LogitScale<E> scale = scale_of<E>(args, index);
  const E label_logit = convert<E>(load_one(row + label_of(args, index)));
  const E row_max = cap_logit(max_logit<E>(row, columns), scale.softcap).value;
  const RowSums sums =
      row_sums(row, columns, scale, finite_or_zero(row_max), keeps_nothing, next_row, no_gradient);
  static_cast<RowStats<E>*>(args.workspace)[index] = {row_max, label_logit, sums};
}

template <typename E, typename Stored, typename Gradient>
void run_rows(const LogitsArgs& args, RowRange range, int64_t after, void* scratch) {
  for (int64_t row = range.begin; row < range.end; ++row) {
    const int64_t next = row + 1 < range.end ? row + 1 : after;
    const bool is_read = next < args.logits.rows && row_is_active(args, next);
    const Stored* next_row = is_read ? args.logits.row<Stored>(next) : nullptr;
    if (args.mode == LogitsMode::kPartial) {
      reduce_row<E>(args, row, next_row);
    } else {
      run_row<E, Stored, Gradient>(args, row, next_row, static_cast<E*>(scratch));
    }
  }
}

}  // namespace

void logits_rows(const LogitsArgs& args, RowRange range, int64_t after, void* scratch) {
  dispatch_floating(args.logits.dtype, [&](auto stored) {
    using Stored = TypeOf<decltype(stored)>;
    dispatch_gradient<Stored>(args.gradient.dtype, [&](auto gradient) {
      using Gradient = TypeOf<decltype(gradient)>;
      run_rows<Compute<Stored>, Stored, Gradient>(args, range, after, scratch);
    });
  });
}

}  // namespace ipo_ext::cpu::IPO_EXT_CPU_ARCH
