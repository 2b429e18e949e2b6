// Tier 2 on CUDA: one block a row of logits, three passes (maximum, sums, gradient) of which only
// the first should come from memory and the rest from the caches. Exponentials are taken after the
// maximum, so there is one each; reductions are shuffles in a fixed tree, so the bits are the same
// every run. No atomics, no host synchronisation.
#include <type_traits>

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector_load.cuh"
#include "kernels/logits.h"

namespace ipo_ext::cuda {
namespace {

using namespace ipo_ext::math;

constexpr int kFaultThreads = 512;
constexpr int kScaleThreads = 256;

// Logits that a thread loads and stores at once: 16 bytes.
template <typename Stored>
constexpr int kLogitsPerLoad = 16 / sizeof(Stored);

template <typename Stored>
using Compute = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

struct Larger {
  template <typename E>
  __device__ __forceinline__ E operator()(E a, E b) const {
    return a > b ? a : b;
  }
};

struct Plus {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

struct MergeRowSums {
  __device__ __forceinline__ RowSums operator()(const RowSums& a, const RowSums& b) const {
    return merge(a, b);
  }
};

// What every thread must know to write its part of a row's gradient.
template <typename E>
struct RowPlan {
  E largest;
  RowDerivative<E> derivative;
};

template <typename E, int kThreads>
struct RowStorage {
  BlockReduceStorage<E, kThreads> largest;
  BlockReduceStorage<RowSums, kThreads> sums;
  RowPlan<E> plan;
};

// Calls body(first column, index of the group's first) for the thread's share of a row: groups of
// kCount columns, then the ragged end one by one. Body is a template over the group's size.
template <int kThreads, int kCount, typename Body>
__device__ __forceinline__ void for_each_group(int64_t columns, const Body& body) {
  const int64_t whole = columns - columns % kCount;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kCount; column < whole;
       column += kThreads * kCount) {
    body(column, std::integral_constant<int, kCount>());
  }
  if constexpr (kCount > 1) {
    for (int64_t column = whole + threadIdx.x; column < columns; column += kThreads) {
      body(column, std::integral_constant<int, 1>());
    }
  }
}

template <int kThreads, int kCount, typename E, typename Gradient>
__device__ __forceinline__ void fill_row(Gradient* gradient, int64_t columns, E value) {
  if (gradient == nullptr) return;
  for_each_group<kThreads, kCount>(columns, [&](int64_t column, auto count) {
    Gradient values[count];
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = narrow<Gradient>(value);
    store_aligned(gradient + column, values);
  });
}

// The thread's largest logit; NaNs are passed over, they show in the sums.
template <int kThreads, int kCount, typename E, typename Stored>
__device__ __forceinline__ E largest_of_thread(const Stored* row, int64_t columns) {
  E largest = -std::numeric_limits<E>::infinity();
  for_each_group<kThreads, kCount>(columns, [&](int64_t column, auto count) {
    Stored logits[count];
    load_mutable(row + column, logits);
#pragma unroll
    for (int i = 0; i < count; ++i) largest = Larger()(convert<E>(logits[i]), largest);
  });
  return largest;
}

// Each group is added up before it joins the thread's sums: fewer roundings of large numbers.
template <int kThreads, int kCount, typename E, typename Stored>
__device__ __forceinline__ RowSums sums_of_thread(const Stored* row, int64_t columns,
                                                  const LogitScale<E>& scale, E largest) {
  E exponentials = 0, weighted_sum = 0;
  for_each_group<kThreads, kCount>(columns, [&](int64_t column, auto count) {
    Stored logits[count];
    load_mutable(row + column, logits);
    E group_exponentials = 0, group_weighted = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const E capped = cap_logit(convert<E>(logits[i]), scale.softcap).value;
      const RowTerm<E> term = row_term(capped, largest, scale.inverse_temperature);
      group_exponentials += term.exponential;
      group_weighted += weighted(term);
    }
    exponentials += group_exponentials;
    weighted_sum += group_weighted;
  });
  return {exponentials, weighted_sum};
}

// The gradient may lie over the logits. One that is narrower than they are meets columns of other
// threads, always lower ones: no step stores before the block has loaded all of it.
template <int kThreads, int kCount, typename E, typename Stored, typename Gradient>
__device__ __forceinline__ void write_gradient(const Stored* row, int64_t columns,
                                               const LogitScale<E>& scale, const RowPlan<E>& plan,
                                               Gradient* gradient) {
  const auto step = [&](int64_t column, bool exists, auto count) {
    Stored logits[count];
    Gradient values[count];
    if (exists) load_mutable(row + column, logits);
    if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
    if (!exists) return;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const CappedLogit<E> capped = cap_logit(convert<E>(logits[i]), scale.softcap);
      const RowTerm<E> term = row_term(capped.value, plan.largest, scale.inverse_temperature);
      values[i] = narrow<Gradient>(plan.derivative.other(term, capped.slope));
    }
    store_aligned(gradient + column, values);
  };
  const int64_t whole = columns - columns % kCount;
  for (int64_t first = 0; first < whole; first += kThreads * kCount) {
    const int64_t column = first + static_cast<int64_t>(threadIdx.x) * kCount;
    step(column, column < whole, std::integral_constant<int, kCount>());
  }
  for (int64_t first = whole; first < columns; first += kThreads) {
    step(first + threadIdx.x, first + threadIdx.x < columns, std::integral_constant<int, 1>());
  }
}

// Reduces the row, or takes what the forward pass has saved. All threads must call; valid in all.
template <int kThreads, int kCount, typename E, typename Stored>
__device__ __forceinline__ RowPlan<E> plan_row(const LogitsArgs& args, int64_t index,
                                               const Stored* row, E label_logit,
                                               RowStorage<E, kThreads>& storage) {
  const int64_t columns = args.logits.columns;
  const LogitScale<E> scale = scale_of<E>(args, index);
  if (is_backward(args)) {
    if (threadIdx.x == 0) {
      const RowSlopes<E> slopes = upstream_slopes<E>(args, index);
      storage.plan = {saved_largest<E>(args, index), restore_row<E>(args, index, slopes)};
    }
  } else {
    E largest = largest_of_thread<kThreads, kCount, E>(row, columns);
    largest = block_all_reduce<kThreads>(largest, Larger(), storage.largest);
    largest = cap_logit(largest, scale.softcap).value;
    RowSums sums = sums_of_thread<kThreads, kCount, E>(row, columns, scale, largest);
    sums = block_reduce<kThreads>(sums, MergeRowSums(), storage.sums);
    if (threadIdx.x == 0) {
      const E label_capped = cap_logit(label_logit, scale.softcap).value;
      storage.plan = {largest, finish_row<E>(args, index, sums, largest, label_capped)};
    }
  }
  __syncthreads();
  return storage.plan;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// One block looks at whatever a host would have to synchronise for, before any row is read.
__global__ void __launch_bounds__(kFaultThreads) look_for_faults(const LogitsArgs args) {
  BlockReduceStorage<int64_t, kFaultThreads>& storage =
      shared_storage<BlockReduceStorage<int64_t, kFaultThreads>>();
  bool fault = false;
  int64_t active = 0;
  for (int64_t row = threadIdx.x; row < args.logits.rows; row += kFaultThreads) {
    if (!row_is_active(args, row)) continue;
    ++active;
    fault |= !label_is_valid(args, row) || !temperature_is_valid(args, row);
  }
  active = block_reduce<kFaultThreads>(active, Plus(), storage);
  if (has_loss(args)) {
    for (int64_t s = threadIdx.x; s <= args.loss.segments.count; s += kFaultThreads)
      fault |= !args.loss.segments.entry_is_valid(s);
    fault |= !(load_scalar(args.loss.normalizer) >= 0);
  }
  const int faults = __syncthreads_count(fault);
  if (threadIdx.x == 0) *args.fault = faults > 0 || active > args.max_active;
}

// The second bound only frees the compiler from aiming at more blocks than registers allow.
template <typename Stored, typename Gradient, int kThreads, int kCount>
__global__ void __launch_bounds__(kThreads, 512 / kThreads) logits_rows(const LogitsArgs args) {
  using E = Compute<Stored>;
  RowStorage<E, kThreads>& storage = shared_storage<RowStorage<E, kThreads>>();
  const int64_t index = blockIdx.x;
  const int64_t columns = args.logits.columns;
  Gradient* gradient = args.gradient.data != nullptr ? args.gradient.row<Gradient>(index) : nullptr;

  const bool poisoned = *args.fault != 0;
  bool flows = !poisoned && row_is_active(args, index);
  if (flows && is_backward(args)) flows = !upstream_slopes<E>(args, index).are_zero();
  if (!flows) {
    const E value = poisoned ? std::numeric_limits<E>::quiet_NaN() : E(0);
    if (threadIdx.x == 0) fill_results(args, index, value);
    fill_row<kThreads, kCount>(gradient, columns, value);
    return;
  }

  const Stored* row = args.logits.row<Stored>(index);
  const int64_t label = label_of(args, index);
  const E label_logit = convert<E>(row[label]);
  const RowPlan<E> plan = plan_row<kThreads, kCount>(args, index, row, label_logit, storage);
  if (gradient == nullptr) return;
  if (plan.derivative.slopes.are_zero()) {
    fill_row<kThreads, kCount>(gradient, columns, E(0));
    return;
  }
  const LogitScale<E> scale = scale_of<E>(args, index);
  write_gradient<kThreads, kCount>(row, columns, scale, plan, gradient);
  __syncthreads();  // the label's column is overwritten
  if (threadIdx.x == 0) {
    const CappedLogit<E> capped = cap_logit(label_logit, scale.softcap);
    const RowTerm<E> term = row_term(capped.value, plan.largest, scale.inverse_temperature);
    gradient[label] = narrow<Gradient>(plan.derivative.label(term, capped.slope));
  }
}

template <typename Stored, int kCount>
__global__ void __launch_bounds__(kScaleThreads) scale_elements(const ScaleArgs args) {
  using E = Compute<Stored>;
  const E factor = static_cast<E>(load_scalar(args.factor));
  if (factor == 1) return;
  Stored* gradient = static_cast<Stored*>(args.gradient);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * kCount;
  if (first + kCount <= args.count) {
    Stored values[kCount];
    load_mutable(gradient + first, values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = narrow<Stored>(convert<E>(values[i]) * factor);
    store_aligned(gradient + first, values);
  } else {
    for (int64_t i = first; i < args.count; ++i)
      gradient[i] = narrow<Stored>(convert<E>(gradient[i]) * factor);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

// Whether kCount columns can be loaded or stored at once at every multiple of kCount of every row.
template <typename Stored, int kCount>
bool rows_are_aligned(const LogitsMatrix& matrix) {
  constexpr int64_t kBytes = sizeof(Stored) * kCount;
  return reinterpret_cast<uintptr_t>(matrix.data) % kBytes == 0 &&
         matrix.row_stride % kCount == 0 && matrix.block_stride % kCount == 0;
}

template <typename Stored, typename Gradient, int kThreads, int kCount>
cudaError_t launch_rows(const LogitsArgs& args, cudaStream_t stream) {
  using Storage = RowStorage<Compute<Stored>, kThreads>;
  return launch(logits_rows<Stored, Gradient, kThreads, kCount>, args.logits.rows, kThreads,
                sizeof(Storage), stream, args);
}

// The variant for a matrix, by its columns and its alignment. A short row does not feed a large
// block; a row that does not start on 16 bytes is read one by one.
template <typename Stored, typename Gradient>
cudaError_t launch_variant(const LogitsArgs& args, cudaStream_t stream) {
  constexpr int64_t kShortRow = 4096;
  constexpr int kVector = kLogitsPerLoad<Stored>;
  const bool is_short = args.logits.columns <= kShortRow;
  if (rows_are_aligned<Stored, kVector>(args.logits) &&
      rows_are_aligned<Gradient, kVector>(args.gradient)) {
    return is_short ? launch_rows<Stored, Gradient, 128, kVector>(args, stream)
                    : launch_rows<Stored, Gradient, 512, kVector>(args, stream);
  }
  return is_short ? launch_rows<Stored, Gradient, 128, 1>(args, stream)
                  : launch_rows<Stored, Gradient, 512, 1>(args, stream);
}

// fp32 logits may have a narrower gradient.
template <typename Stored>
cudaError_t launch_logits(const LogitsArgs& args, cudaStream_t stream) {
  if constexpr (std::is_same_v<Stored, float>) {
    if (args.gradient.data != nullptr) {
      if (args.gradient.dtype == DType::kFloat16)
        return launch_variant<float, Float16>(args, stream);
      if (args.gradient.dtype == DType::kBFloat16)
        return launch_variant<float, BFloat16>(args, stream);
    }
  }
  return launch_variant<Stored, Stored>(args, stream);
}

template <typename Stored>
cudaError_t launch_scale(const ScaleArgs& args, cudaStream_t stream) {
  constexpr int kVector = kLogitsPerLoad<Stored>;
  const bool aligned = reinterpret_cast<uintptr_t>(args.gradient) % 16 == 0;
  const int64_t a_block = static_cast<int64_t>(kScaleThreads) * (aligned ? kVector : 1);
  const auto kernel = aligned ? scale_elements<Stored, kVector> : scale_elements<Stored, 1>;
  return launch(kernel, (args.count + a_block - 1) / a_block, kScaleThreads, 0, stream, args);
}

// launcher<Stored>(args, stream) for the dtype at hand.
#define IPO_EXT_FOR_DTYPE(dtype, launcher)                       \
  dtype == DType::kFloat16    ? launcher<Float16>(args, stream)  \
  : dtype == DType::kBFloat16 ? launcher<BFloat16>(args, stream) \
  : dtype == DType::kFloat64  ? launcher<double>(args, stream)   \
                              : launcher<float>(args, stream)

}  // namespace

const char* find_faults(const LogitsArgs& args, CUstream_st* stream) {
  using Storage = BlockReduceStorage<int64_t, kFaultThreads>;
  return error_text(launch(look_for_faults, 1, kFaultThreads, sizeof(Storage), stream, args));
}

const char* logits(const LogitsArgs& args, CUstream_st* stream) {
  if (args.logits.rows == 0) return nullptr;
  return error_text(IPO_EXT_FOR_DTYPE(args.logits.dtype, launch_logits));
}

const char* scale(const ScaleArgs& args, CUstream_st* stream) {
  if (args.count == 0) return nullptr;
  return error_text(IPO_EXT_FOR_DTYPE(args.dtype, launch_scale));
}

}  // namespace ipo_ext::cuda
