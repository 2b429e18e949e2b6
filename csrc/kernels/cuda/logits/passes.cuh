// The passes over a row of logits, from its maximum and sums to its gradient: what each block of
// the row's cluster does, however it keeps its slice.
#pragma once

#include <limits>

#include "kernels/cuda/logits/storage.cuh"
#include "kernels/cuda/logits/thread_sums.cuh"

namespace ipo_ext::cuda {

// Returns the label of an active row, where nothing is at fault.
__device__ __forceinline__ int label_column(const LogitsArgs& args, int64_t row) {
  return static_cast<int>(label_of(args, row));
}

template <typename Gradient>
__device__ __forceinline__ Gradient* gradient_of_row(const LogitsArgs& args, int64_t index) {
  return args.gradient.data != nullptr ? args.gradient.row<Gradient>(index) : nullptr;
}

// Returns whether anything of the row must be read, by what is known before.
template <typename E>
__device__ __forceinline__ bool row_is_needed(const LogitsArgs& args, int64_t row) {
  if (*args.fault != 0 || !row_is_active(args, row)) return false;
  return !is_backward(args) || !upstream_grads<E>(args, row).are_zero();
}

// Fills the results and the gradient of a row that is not needed: with 0, or with NaN under a
// fault.
template <typename E, typename Slice, typename Gradient>
__device__ __forceinline__ void fill_row(const LogitsArgs& args, int64_t row, bool stores_results,
                                         const Slice& slice, int vectors, Gradient* gradient) {
  const E value = *args.fault != 0 ? std::numeric_limits<E>::quiet_NaN() : E(0);
  if (stores_results) fill_results(args, row, value);
  if (gradient == nullptr) return;
  if (stores_results && threadIdx.x == 0) fill_scale<Gradient>(args, row);
  slice.fill(gradient, vectors, value);
}

// Makes a row's results of its maximum and sums and leaves the terms of its gradient in `storage`;
// one thread calls it. The row waits in memory while its loss is computed, whose arithmetic needs
// the registers.
template <typename Gradient, bool kCapped, typename Terms, typename E, typename Storage>
__device__ __forceinline__ void finish_row(const LogitsArgs& args, int64_t index,
                                           const RowStats<E>& stats, bool stores_results,
                                           Storage& storage) {
  storage.stats = stats;
  const E label_capped = cap<kCapped>(stats.label_logit, storage.scale).value;
  const RowResult<E> result = result_of_row(args, index, stats.sums, stats.row_max, label_capped);
  if (stores_results) store_results(args, index, result, stats.sums, stats.row_max);
  storage.result = result;
  compiler_barrier();
  storage.grads = loss_grads(args, index, result.logprob);
  compiler_barrier();
  const LogitScale<E> scale = storage.scale;
  const RowGrads<E> grads = over_scale<Gradient>(args, index, stores_results, storage.grads,
                                                 storage.result.entropy, scale.inverse_temperature);
  const RowDerivative<E> derivative = row_derivative<E>(
      grads, storage.stats.sums.sum_exp, storage.result.entropy, scale.inverse_temperature);
  storage.terms = gradient_terms<Terms, kCapped>(derivative, scale, storage.stats.row_max,
                                                 storage.stats.label_logit);
}

// Takes a row's sums from what its terms are relative to, to its maximum.
template <typename Row, typename E>
__device__ __forceinline__ RowStats<E> relative_to_max(const RowStats<E>& stats,
                                                       const LogitScale<E>& scale) {
  const typename Row::Terms terms(scale, finite_or_zero(stats.row_max));
  return {stats.row_max, stats.label_logit, terms.relative_to_max(stats.sums)};
}

// The first two passes: reduces a row over the blocks of its cluster, which exchange its maximum
// and then its sums, which relative_to_max() is left to take there. It leaves the label, its logit
// and the scale in `storage`; the maximum is valid in every thread, the sums in the first warp.
// `phase` counts the cluster's rows before this one; `before_sending` is called before anything is
// sent to another block.
template <bool kCapped, int kThreads, typename Row, typename Storage, typename BeforeSending>
__device__ __forceinline__ auto reduce_row(const LogitsArgs& args, int64_t index, int label,
                                           const Cluster& cluster, unsigned phase, Row& row,
                                           Storage& storage, const BeforeSending& before_sending)
    -> RowStats<typename Row::E> {
  using E = typename Row::E;
  E label_logit = 0;
  if (threadIdx.x == 0) label_logit = row.logit(label);
  E row_max = row.load();
  if (threadIdx.x == 0) storage.scale = scale_of<E>(args, index);
  before_sending();
  cluster_all_gather<kThreads>(row_max, Max(), cluster, phase, storage.row_max);
  row_max = reduce_gathered<kThreads>(row_max, Max(), cluster, storage.row_max);
  const LogitScale<E> scale = storage.scale;
  row_max = cap<kCapped>(row_max, scale).value;
  RowSums sums = row.exponentiate(scale, finite_or_zero(row_max));
  if (threadIdx.x == 0) {  // only now are all done with the label of the row before
    storage.label = label;
    storage.label_logit = label_logit;  // loaded while all that went on
  }
  cluster_all_gather<kThreads>(sums, MergeRowSums(), cluster, phase, storage.sums);
  if (threadIdx.x < kWarpSize)
    sums = reduce_gathered<kThreads>(RowSums{0, 0}, MergeRowSums(), cluster, storage.sums);
  return {row_max, storage.label_logit, sums};
}

// Takes a row from its logits to its gradient.
template <typename Gradient, bool kCapped, typename Stored, int kThreads, typename Row,
          typename Storage, typename BeforeSending>
__device__ __forceinline__ void process_row(const RowKernelArgs& rows, int64_t index, int label,
                                            RowSlice<Stored, kThreads>& slice,
                                            const Cluster& cluster, unsigned phase, Row& row,
                                            Storage& storage, const BeforeSending& before_sending) {
  using E = Compute<Stored>;
  const LogitsArgs& args = rows.logits;
  const RowStats<E> stats = reduce_row<kCapped, kThreads>(args, index, label, cluster, phase, row,
                                                          storage, before_sending);
  if (threadIdx.x < kWarpSize) {
    row.spill_to_shared();
    if (threadIdx.x == 0) {
      finish_row<Gradient, kCapped, typename Row::Terms>(
          args, index, relative_to_max<Row>(stats, storage.scale), cluster.rank == 0, storage);
      storage.gradient = gradient_of_row<Gradient>(args, index);
    }
    row.restore_from_shared();
  }
  if (args.gradient.data == nullptr) return;
  __syncthreads();
  const GradientTerms<E> terms = storage.terms;
  Gradient* gradient = static_cast<Gradient*>(storage.gradient);
  if (terms.derivative.grads.are_zero()) return slice.fill(gradient, rows.plan.vectors, E(0));
  row.write_gradient(terms, gradient);
  if (slice.is_mine(storage.label)) gradient[storage.label] = narrow<Gradient>(terms.label);
}

// Writes the gradient of a slice of which nothing is kept. It may go over the logits; a narrower
// one must have its row to itself, for it meets columns of other threads.
template <bool kCapped, int kThreads, typename E, typename Stored, typename Gradient>
__device__ __forceinline__ void stream_gradient(const RowSlice<Stored, kThreads>& slice,
                                                int vectors, const GradientTerms<E>& terms,
                                                Gradient* gradient) {
  constexpr int kBatch = 4;
  const bool aligned = slice.is_aligned(gradient);
  const E extra = slice.load_extra();
  for (int vector = 0; vector < vectors; vector += kBatch) {
    uint4 words[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) words[i] = slice.load(vector + i);
    if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      E values[kVectorElements<Stored>];
      slice.widen(words[i], values);
#pragma unroll
      for (E& value : values) value = terms.template other<kCapped>(value);
      slice.store(gradient, aligned, vector + i, values);
    }
  }
  if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
  slice.store_extra(gradient, terms.template other<kCapped>(extra));
}

// Merges the maximum and the sums of a row from those of its splits; valid in thread 0. All threads
// must call.
template <typename E, typename Stored, int kThreads>
__device__ __forceinline__ RowStats<E> merge_splits(const LogitsArgs& args, int64_t index,
                                                    const RowStats<E>* splits, int count,
                                                    RowStorage<Stored, kThreads>& storage) {
  const Cluster alone = {0, 1};
  E row_max = -std::numeric_limits<E>::infinity();
  for (int split = threadIdx.x; split < count; split += kThreads)
    row_max = Max()(splits[split].row_max, row_max);
  cluster_all_gather<kThreads>(row_max, Max(), alone, 0, storage.row_max);
  row_max = reduce_gathered<kThreads>(row_max, Max(), alone, storage.row_max);
  const double temperature = temperature_of<E>(args, index);
  RowSums sums = {0, 0};
  for (int split = threadIdx.x; split < count; split += kThreads) {
    const double shift = static_cast<double>(splits[split].row_max) - row_max;
    sums = merge(sums, shifted(splits[split].sums, shift / temperature));
  }
  cluster_all_gather<kThreads>(sums, MergeRowSums(), alone, 0, storage.sums);
  sums = reduce_gathered<kThreads>(RowSums{0, 0}, MergeRowSums(), alone, storage.sums);
  return {row_max, splits[0].label_logit, sums};
}

}  // namespace ipo_ext::cuda
