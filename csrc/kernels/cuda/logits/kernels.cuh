// The kernels over rows of logits, and their launches: each path of a LaunchPlan has one.
#pragma once

#include <type_traits>

#include "kernels/cuda/logits/launch.cuh"
#include "kernels/cuda/logits/passes.cuh"
#include "kernels/cuda/logits/pipelined_row.cuh"
#include "kernels/cuda/logits/resident_row.cuh"

namespace ipo_ext::cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// RowPath::kResident: each cluster has one row.
template <typename Stored, typename Gradient, int kThreads, bool kCapped>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(kThreads))
    logits_resident(const RowKernelArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kThreads>& storage = shared_storage<RowStorage<Stored, kThreads>>();
  const LogitsArgs& args = rows.logits;
  const Cluster cluster = this_cluster();
  const int64_t index = blockIdx.x / cluster.blocks;
  RowSlice<Stored, kThreads> slice(args.logits.row<Stored>(index),
                                   static_cast<int>(args.logits.columns), cluster.rank,
                                   cluster.blocks);
  if (!row_is_needed<E>(args, index)) {
    fill_row<E>(args, index, cluster.rank == 0, slice, rows.plan.vectors,
                gradient_of_row<Gradient>(args, index));
  } else {
    storage.init();
    cluster.arrive();
    ResidentRow<Stored, kThreads, kCapped> row(rows, slice, storage);
    process_row<Gradient, kCapped>(rows, index, label_column(args, index), slice, cluster, 0, row,
                                   storage, [&] { cluster.wait(); });
  }
}

// RowPath::kPipelined: each cluster has several rows, which registers keep. Each row is copied to
// shared memory while the one before is worked on.
template <typename Stored, typename Gradient>
__global__ void __launch_bounds__(kPipelinedThreads, kPipelinedBlocksPerMultiprocessor)
    logits_pipelined(const RowKernelArgs rows) {
  using E = Compute<Stored>;
  using Row = PipelinedRow<Stored>;
  typename Row::Storage& storage = shared_storage<typename Row::Storage>();
  const LogitsArgs& args = rows.logits;
  const Cluster cluster = this_cluster();
  const auto slice_of = [&](int64_t index) {
    return typename Row::Slice(args.logits.row<Stored>(index),
                               static_cast<int>(args.logits.columns), cluster.rank, cluster.blocks);
  };
  const int64_t first = blockIdx.x / cluster.blocks * int64_t{rows.plan.rows_per_cluster};
  const int64_t end = min(first + rows.plan.rows_per_cluster, args.logits.rows);
  // Returns the label's column, or -1 for a row that is not needed.
  const auto label_if_needed = [&](int64_t index) {
    return index < end && row_is_needed<E>(args, index) ? label_column(args, index) : -1;
  };
  unsigned phase = 0;
  storage.init();
  cluster.arrive();
  int label = label_if_needed(first);
  if (label >= 0) Row::prefetch(slice_of(first), storage);
  cluster.wait();
  for (int64_t index = first; index < end; ++index) {
    const int next_label = label_if_needed(index + 1);
    typename Row::Slice slice = slice_of(index);
    Row row(slice, storage);
    if (label >= 0) row.receive();
    if (next_label >= 0) Row::prefetch(slice_of(index + 1), storage);
    if (label >= 0) {
      process_row<Gradient, false>(rows, index, label, slice, cluster, phase++, row, storage,
                                   [] {});
    } else {
      fill_row<E>(args, index, cluster.rank == 0, slice, rows.plan.vectors,
                  gradient_of_row<Gradient>(args, index));
    }
    label = next_label;
  }
}

// RowPath::kSplit, first launch: `splits` blocks for each of few rows leave its stats in the
// workspace.
template <typename Stored, bool kCapped>
__global__ void __launch_bounds__(kSplitThreads, blocks_per_multiprocessor(kSplitThreads))
    logits_split(const RowKernelArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kSplitThreads>& storage = shared_storage<RowStorage<Stored, kSplitThreads>>();
  const LogitsArgs& args = rows.logits;
  const int64_t index = blockIdx.x / rows.plan.splits;
  if (!row_is_needed<E>(args, index)) return;
  RowSlice<Stored, kSplitThreads> slice(args.logits.row<Stored>(index),
                                        static_cast<int>(args.logits.columns),
                                        blockIdx.x % rows.plan.splits, rows.plan.splits);
  const Cluster alone = {0, 1};
  using Row = ResidentRow<Stored, kSplitThreads, kCapped>;
  Row row(rows, slice, storage);
  const RowStats<E> stats = reduce_row<kCapped, kSplitThreads>(
      args, index, label_column(args, index), alone, 0, row, storage, [] {});
  if (threadIdx.x == 0)
    static_cast<RowStats<E>*>(args.workspace)[blockIdx.x] =
        relative_to_max<Row>(stats, storage.scale);
}

// RowPath::kSplit, second launch, and RowPath::kStreamed: rows whose sums are known, with
// `stream_splits` blocks for each.
template <typename Stored, typename Gradient, bool kCapped>
__global__ void __launch_bounds__(kStreamThreads, sizeof(Stored) == 8 ? 2 : 3)
    logits_streamed(const RowKernelArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kStreamThreads>& storage =
      shared_storage<RowStorage<Stored, kStreamThreads>>();
  const LogitsArgs& args = rows.logits;
  const int64_t index = blockIdx.x / rows.plan.stream_splits;
  const int split = blockIdx.x % rows.plan.stream_splits;
  Gradient* gradient = gradient_of_row<Gradient>(args, index);
  const RowSlice<Stored, kStreamThreads> slice(args.logits.row<Stored>(index),
                                               static_cast<int>(args.logits.columns), split,
                                               rows.plan.stream_splits);
  if (!row_is_needed<E>(args, index))
    return fill_row<E>(args, index, split == 0, slice, rows.plan.stream_vectors, gradient);
  const int label = label_column(args, index);
  if (is_backward(args)) {
    // Only the block that has the label's column may read it: others may have overwritten theirs.
    const bool owner = slice.is_mine(label);
    if (owner) storage.label_logit = convert<E>(slice.row[label]);
    const bool owned = __syncthreads_or(owner);
    if (threadIdx.x == 0) {
      const RowDerivative<E> derivative =
          restore_row<Gradient>(args, index, split == 0, upstream_grads<E>(args, index));
      storage.terms = gradient_terms<LogitTerms<Stored, kCapped>, kCapped>(
          derivative, scale_of<E>(args, index), saved_row_max<E>(args, index),
          owned ? storage.label_logit : E(0));
    }
  } else {
    const RowStats<E>* splits =
        static_cast<const RowStats<E>*>(args.workspace) + index * rows.plan.splits;
    const RowStats<E> stats = merge_splits(args, index, splits, rows.plan.splits, storage);
    if (threadIdx.x == 0) {
      storage.scale = scale_of<E>(args, index);
      finish_row<Gradient, kCapped, LogitTerms<Stored, kCapped>>(args, index, stats, split == 0,
                                                                 storage);
    }
  }
  if (gradient == nullptr) return;
  __syncthreads();
  const GradientTerms<E> terms = storage.terms;
  if (terms.derivative.grads.are_zero())
    return slice.fill(gradient, rows.plan.stream_vectors, E(0));
  stream_gradient<kCapped>(slice, rows.plan.stream_vectors, terms, gradient);
  if (slice.is_mine(label)) gradient[label] = narrow<Gradient>(terms.label);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

template <typename Stored, typename Gradient, int kThreads, bool kCapped>
cudaError_t launch_resident(const RowKernelArgs& rows, cudaStream_t stream) {
  const LaunchPlan& plan = rows.plan;
  return launch_with_all_shared(logits_resident<Stored, Gradient, kThreads, kCapped>,
                                rows.logits.logits.rows * plan.cluster_blocks, kThreads,
                                plan.shared_bytes, plan.device_shared_bytes, stream, rows,
                                plan.cluster_blocks);
}

template <typename Stored, typename Gradient>
cudaError_t launch_resident(const RowKernelArgs& rows, cudaStream_t stream) {
  if (rows.logits.softcap != 0)
    return launch_resident<Stored, Gradient, kCappedThreads, true>(rows, stream);
  return rows.plan.threads == 256 ? launch_resident<Stored, Gradient, 256, false>(rows, stream)
                                  : launch_resident<Stored, Gradient, 512, false>(rows, stream);
}

template <typename Stored, typename Gradient>
cudaError_t launch_pipelined(const RowKernelArgs& rows, cudaStream_t stream) {
  if constexpr (sizeof(Compute<Stored>) == 4) {
    const LaunchPlan& plan = rows.plan;
    const int64_t clusters = divide_up(rows.logits.logits.rows, plan.rows_per_cluster);
    return launch_with_all_shared(
        logits_pipelined<Stored, Gradient>, clusters * plan.cluster_blocks, kPipelinedThreads,
        plan.shared_bytes, plan.device_shared_bytes, stream, rows, plan.cluster_blocks);
  }
  return cudaErrorInvalidValue;  // no plan asks for it
}

template <typename Stored, typename Gradient>
cudaError_t launch_streamed(const RowKernelArgs& rows, cudaStream_t stream) {
  const auto kernel = rows.logits.softcap == 0 ? logits_streamed<Stored, Gradient, false>
                                               : logits_streamed<Stored, Gradient, true>;
  return launch(kernel, rows.logits.logits.rows * rows.plan.stream_splits, kStreamThreads,
                kStorageBytes, stream, rows);
}

template <typename Stored>
cudaError_t launch_split(const RowKernelArgs& rows, cudaStream_t stream) {
  const auto kernel =
      rows.logits.softcap == 0 ? logits_split<Stored, false> : logits_split<Stored, true>;
  const cudaError_t error =
      launch_with_all_shared(kernel, rows.logits.logits.rows * rows.plan.splits, kSplitThreads,
                             rows.plan.shared_bytes, rows.plan.device_shared_bytes, stream, rows);
  if (error != cudaSuccess || rows.logits.mode == LogitsMode::kPartial) return error;
  return launch_streamed<Stored, Stored>(rows, stream);
}

template <typename Stored, typename Gradient>
cudaError_t launch_planned(const RowKernelArgs& rows, cudaStream_t stream) {
  switch (rows.plan.path) {
    case RowPath::kResident:
      return launch_resident<Stored, Gradient>(rows, stream);
    case RowPath::kPipelined:
      return launch_pipelined<Stored, Gradient>(rows, stream);
    case RowPath::kSplit:
      return launch_split<Stored>(rows, stream);
    case RowPath::kStreamed:
      return launch_streamed<Stored, Gradient>(rows, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename Stored>
cudaError_t launch_logits(const LogitsArgs& args, const LaunchPlan& plan, cudaStream_t stream) {
  return dispatch_gradient<Stored>(args.gradient.dtype, [&](auto gradient) {
    return launch_planned<Stored, TypeOf<decltype(gradient)>>({args, plan}, stream);
  });
}

}  // namespace ipo_ext::cuda
