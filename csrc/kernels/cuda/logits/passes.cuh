// From a row of logits to its result and its gradient: what each block of its cluster does, however
// it holds its share.
#pragma once

#include <limits>

#include "kernels/cuda/logits/storage.cuh"
#include "kernels/cuda/logits/thread_sums.cuh"

namespace ipo_ext::cuda {

// Of an active row, where nothing is at fault.
__device__ __forceinline__ int label_column(const LogitsArgs& args, int64_t row) {
  return static_cast<int>(label_of(args, row));
}

template <typename Gradient>
__device__ __forceinline__ Gradient* gradient_of_row(const LogitsArgs& args, int64_t index) {
  return args.gradient.data != nullptr ? args.gradient.row<Gradient>(index) : nullptr;
}

// Whether anything of the row must be read, by what is known before.
template <typename E>
__device__ __forceinline__ bool row_flows(const LogitsArgs& args, int64_t row) {
  if (*args.fault != 0 || !row_is_active(args, row)) return false;
  return !is_backward(args) || !upstream_slopes<E>(args, row).are_zero();
}

// What a row that does not flow gets: zeros, or NaN under a fault.
template <typename E, typename Share, typename Gradient>
__device__ __forceinline__ void fill_row(const LogitsArgs& args, int64_t row, bool stores_results,
                                         const Share& share, int steps, Gradient* gradient) {
  const E value = *args.fault != 0 ? std::numeric_limits<E>::quiet_NaN() : E(0);
  if (stores_results) fill_results(args, row, value);
  if (gradient != nullptr) share.fill(gradient, steps, value);
}

// By one thread: what a row's maximum and sums make of its token and, in `storage`, of its
// gradient. The row waits in memory while its loss is computed, whose arithmetic needs the
// registers.
template <bool kCapped, typename E, typename Storage>
__device__ __forceinline__ void finish_row(const LogitsArgs& args, int64_t index,
                                           const RowPart<E>& row, bool stores_results,
                                           Storage& storage) {
  storage.row = row;
  const E label_capped = cap<kCapped>(row.label_logit, storage.scale).value;
  const RowResult<E> result = result_of_row(args, index, row.sums, row.largest, label_capped);
  if (stores_results) store_results(args, index, result, row.sums, row.largest);
  storage.result = result;
  forget_memory();
  storage.slopes = slopes_of_row(args, index, result.logprob);
  forget_memory();
  const LogitScale<E> scale = storage.scale;
  const RowDerivative<E> derivative =
      row_derivative<E>(storage.slopes, storage.row.sums.exponentials, storage.result.entropy,
                        scale.inverse_temperature);
  storage.plan = plan_of<kCapped>(derivative, scale, storage.row.largest, storage.row.label_logit);
}

// The first two passes over what the blocks of a cluster hold. Leaves the label, its logit and the
// scale in `storage`; the maximum is valid in every thread, the sums in the first warp.
// `turn` counts the cluster's rows before it; `before_posting` is called before anything is sent
// to another block.
template <bool kCapped, int kThreads, typename Held, typename Storage, typename BeforePosting>
__device__ __forceinline__ auto reduce_row(const LogitsArgs& args, int64_t index, int label,
                                           const Cluster& cluster, unsigned turn, Held& held,
                                           Storage& storage, const BeforePosting& before_posting)
    -> RowPart<typename Held::E> {
  using E = typename Held::E;
  E label_logit = 0;
  if (threadIdx.x == 0) label_logit = held.logit(label);
  E largest = held.load();
  if (threadIdx.x == 0) storage.scale = scale_of<E>(args, index);
  before_posting();
  post_to_cluster<kThreads>(largest, Larger(), cluster, turn, storage.largest);
  largest = merge_posted<kThreads>(largest, Larger(), cluster, storage.largest);
  const LogitScale<E> scale = storage.scale;
  largest = cap<kCapped>(largest, scale).value;
  RowSums sums = held.exponentiate(scale, finite_or_zero(largest));
  if (threadIdx.x == 0) {  // only now are all done with the label of the row before
    storage.label = label;
    storage.label_logit = label_logit;  // loaded while all that went on
  }
  post_to_cluster<kThreads>(sums, MergeRowSums(), cluster, turn, storage.sums);
  if (threadIdx.x < kWarpSize)
    sums = merge_posted<kThreads>(RowSums{0, 0}, MergeRowSums(), cluster, storage.sums);
  return {largest, storage.label_logit, sums};
}

// The row, from its logits to its gradient.
template <typename Gradient, bool kCapped, typename Stored, int kThreads, typename Held,
          typename Storage, typename BeforePosting>
__device__ __forceinline__ void process_row(const RowsArgs& rows, int64_t index, int label,
                                            RowShare<Stored, kThreads>& share,
                                            const Cluster& cluster, unsigned turn, Held& held,
                                            Storage& storage, const BeforePosting& before_posting) {
  using E = Compute<Stored>;
  const LogitsArgs& args = rows.logits;
  const RowPart<E> row = reduce_row<kCapped, kThreads>(args, index, label, cluster, turn, held,
                                                       storage, before_posting);
  if (threadIdx.x < kWarpSize) {
    held.put_aside();
    if (threadIdx.x == 0) {
      finish_row<kCapped>(args, index, row, cluster.rank == 0, storage);
      storage.gradient = gradient_of_row<Gradient>(args, index);
    }
    held.take_back();
  }
  if (args.gradient.data == nullptr) return;
  __syncthreads();
  const RowPlan<E> plan = storage.plan;
  Gradient* gradient = static_cast<Gradient*>(storage.gradient);
  if (plan.derivative.slopes.are_zero()) return share.fill(gradient, rows.plan.vectors, E(0));
  held.write_gradient(plan, gradient);
  if (share.is_mine(storage.label)) gradient[storage.label] = narrow<Gradient>(plan.label);
}

// The gradient of a share of which nothing is held. May go over the logits; a narrower one must
// have its row to itself, for it meets columns of other threads.
template <bool kCapped, int kThreads, typename E, typename Stored, typename Gradient>
__device__ __forceinline__ void stream_gradient(const RowShare<Stored, kThreads>& share, int steps,
                                                const RowPlan<E>& plan, Gradient* gradient) {
  constexpr int kBatch = 4;
  const bool aligned = share.is_aligned(gradient);
  const E extra = share.load_extra();
  for (int step = 0; step < steps; step += kBatch) {
    uint4 words[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) words[i] = share.load(step + i);
    if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      E values[kGroupColumns<Stored>];
      share.widen(words[i], values);
#pragma unroll
      for (E& value : values) value = plan.template other<kCapped>(value);
      share.store(gradient, aligned, step + i, values);
    }
  }
  if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
  share.store_extra(gradient, plan.template other<kCapped>(extra));
}

// The maximum and the sums of a row from those of its parts, in thread 0. All threads must call.
template <typename E, typename Stored, int kThreads>
__device__ __forceinline__ RowPart<E> merge_parts(const LogitsArgs& args, int64_t index,
                                                  const RowPart<E>* parts, int count,
                                                  RowStorage<Stored, kThreads>& storage) {
  const Cluster alone = {0, 1};
  E largest = -std::numeric_limits<E>::infinity();
  for (int part = threadIdx.x; part < count; part += kThreads)
    largest = Larger()(parts[part].largest, largest);
  post_to_cluster<kThreads>(largest, Larger(), alone, 0, storage.largest);
  largest = merge_posted<kThreads>(largest, Larger(), alone, storage.largest);
  const double temperature = temperature_of(args, index);
  RowSums sums = {0, 0};
  for (int part = threadIdx.x; part < count; part += kThreads) {
    const double below = static_cast<double>(parts[part].largest) - largest;
    sums = merge(sums, shifted(parts[part].sums, below / temperature));
  }
  post_to_cluster<kThreads>(sums, MergeRowSums(), alone, 0, storage.sums);
  sums = merge_posted<kThreads>(RowSums{0, 0}, MergeRowSums(), alone, storage.sums);
  return {largest, parts[0].label_logit, sums};
}

}  // namespace ipo_ext::cuda
