// Tier 2's kernels, and the launcher that chooses among them.
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

// One cluster a row.
template <typename Stored, typename Gradient, int kThreads, bool kCapped>
__global__ void __launch_bounds__(kThreads, blocks_together(kThreads))
    logits_rows(const RowsArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kThreads>& storage = shared_storage<RowStorage<Stored, kThreads>>();
  const LogitsArgs& args = rows.logits;
  const Cluster cluster = this_cluster();
  const int64_t index = blockIdx.x / cluster.blocks;
  RowShare<Stored, kThreads> share(args.logits.row<Stored>(index),
                                   static_cast<int>(args.logits.columns), cluster.rank,
                                   cluster.blocks);
  if (!row_flows<E>(args, index)) {
    fill_row<E>(args, index, cluster.rank == 0, share, rows.plan.vectors,
                gradient_of_row<Gradient>(args, index));
  } else {
    storage.prepare();
    cluster.say_started();
    HeldRow<Stored, kThreads, kCapped> held(rows, share, storage);
    process_row<Gradient, kCapped>(rows, index, label_column(args, index), share, cluster, 0, held,
                                   storage, [&] { cluster.wait_for_all(); });
  }
}

// The same for rows that registers hold, some of them in turn: each is copied ahead while the one
// before is worked on.
template <typename Stored, typename Gradient>
__global__ void __launch_bounds__(kPipelinedThreads, kPipelinedBlocksTogether)
    logits_rows_in_turn(const RowsArgs rows) {
  using E = Compute<Stored>;
  using Held = RowInTurn<Stored>;
  typename Held::Storage& storage = shared_storage<typename Held::Storage>();
  const LogitsArgs& args = rows.logits;
  const Cluster cluster = this_cluster();
  const auto share_of = [&](int64_t index) {
    return
        typename Held::Share(args.logits.row<Stored>(index), static_cast<int>(args.logits.columns),
                             cluster.rank, cluster.blocks);
  };
  const int64_t first = blockIdx.x / cluster.blocks * int64_t{rows.plan.rows_per_cluster};
  const int64_t end = min(first + rows.plan.rows_per_cluster, args.logits.rows);
  // The label's column, or -1 for a row that does not flow.
  const auto label_if_flowing = [&](int64_t index) {
    return index < end && row_flows<E>(args, index) ? label_column(args, index) : -1;
  };
  unsigned turn = 0;
  storage.prepare();
  cluster.say_started();
  int label = label_if_flowing(first);
  if (label >= 0) Held::fetch(share_of(first), storage);
  cluster.wait_for_all();
  for (int64_t index = first; index < end; ++index) {
    const int next_label = label_if_flowing(index + 1);
    typename Held::Share share = share_of(index);
    Held held(share, storage);
    if (label >= 0) held.take();
    if (next_label >= 0) Held::fetch(share_of(index + 1), storage);
    if (label >= 0) {
      process_row<Gradient, false>(rows, index, label, share, cluster, turn++, held, storage,
                                   [] {});
    } else {
      fill_row<E>(args, index, cluster.rank == 0, share, rows.plan.vectors,
                  gradient_of_row<Gradient>(args, index));
    }
    label = next_label;
  }
}

// Few rows: `parts` blocks for each, which leave what they found in the workspace.
template <typename Stored, bool kCapped>
__global__ void __launch_bounds__(kSplitThreads, blocks_together(kSplitThreads))
    logits_parts(const RowsArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kSplitThreads>& storage = shared_storage<RowStorage<Stored, kSplitThreads>>();
  const LogitsArgs& args = rows.logits;
  const int64_t index = blockIdx.x / rows.plan.splits;
  if (!row_flows<E>(args, index)) return;
  RowShare<Stored, kSplitThreads> share(args.logits.row<Stored>(index),
                                        static_cast<int>(args.logits.columns),
                                        blockIdx.x % rows.plan.splits, rows.plan.splits);
  const Cluster alone = {0, 1};
  HeldRow<Stored, kSplitThreads, kCapped> held(rows, share, storage);
  const RowPart<E> part = reduce_row<kCapped, kSplitThreads>(args, index, label_column(args, index),
                                                             alone, 0, held, storage, [] {});
  if (threadIdx.x == 0) static_cast<RowPart<E>*>(args.workspace)[blockIdx.x] = part;
}

// The second launch for few rows, and the whole backward pass: rows whose sums are known, each
// shared by `stream_parts` blocks.
template <typename Stored, typename Gradient, bool kCapped>
__global__ void __launch_bounds__(kStreamThreads, sizeof(Stored) == 8 ? 2 : 3)
    logits_stream(const RowsArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kStreamThreads>& storage =
      shared_storage<RowStorage<Stored, kStreamThreads>>();
  const LogitsArgs& args = rows.logits;
  const int64_t index = blockIdx.x / rows.plan.stream_splits;
  const int part = blockIdx.x % rows.plan.stream_splits;
  Gradient* gradient = gradient_of_row<Gradient>(args, index);
  const RowShare<Stored, kStreamThreads> share(args.logits.row<Stored>(index),
                                               static_cast<int>(args.logits.columns), part,
                                               rows.plan.stream_splits);
  if (!row_flows<E>(args, index))
    return fill_row<E>(args, index, part == 0, share, rows.plan.stream_vectors, gradient);
  const int label = label_column(args, index);
  if (is_backward(args)) {
    // Only the block that has the label's column may read it: others may have overwritten theirs.
    const bool owner = share.is_mine(label);
    if (owner) storage.label_logit = convert<E>(share.row[label]);
    const bool owned = __syncthreads_or(owner);
    if (threadIdx.x == 0) {
      const RowDerivative<E> derivative =
          restore_row<E>(args, index, upstream_slopes<E>(args, index));
      storage.plan =
          plan_of<kCapped>(derivative, scale_of<E>(args, index), saved_largest<E>(args, index),
                           owned ? storage.label_logit : E(0));
    }
  } else {
    const RowPart<E>* parts =
        static_cast<const RowPart<E>*>(args.workspace) + index * rows.plan.splits;
    const RowPart<E> row = merge_parts(args, index, parts, rows.plan.splits, storage);
    if (threadIdx.x == 0) {
      storage.scale = scale_of<E>(args, index);
      finish_row<kCapped>(args, index, row, part == 0, storage);
    }
  }
  if (gradient == nullptr) return;
  __syncthreads();
  const RowPlan<E> plan = storage.plan;
  if (plan.derivative.slopes.are_zero())
    return share.fill(gradient, rows.plan.stream_vectors, E(0));
  stream_gradient<kCapped>(share, rows.plan.stream_vectors, plan, gradient);
  if (share.is_mine(label)) gradient[label] = narrow<Gradient>(plan.label);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

template <typename Stored, typename Gradient, int kThreads, bool kCapped>
cudaError_t launch_resident(const RowsArgs& rows, cudaStream_t stream) {
  const LaunchPlan& plan = rows.plan;
  return launch_with_all_shared(logits_rows<Stored, Gradient, kThreads, kCapped>,
                                rows.logits.logits.rows * plan.cluster_blocks, kThreads,
                                plan.shared_bytes, stream, rows, plan.cluster_blocks);
}

template <typename Stored, typename Gradient>
cudaError_t launch_resident(const RowsArgs& rows, cudaStream_t stream) {
  if (rows.logits.softcap != 0)
    return launch_resident<Stored, Gradient, kCappedThreads, true>(rows, stream);
  return rows.plan.threads == 256 ? launch_resident<Stored, Gradient, 256, false>(rows, stream)
                                  : launch_resident<Stored, Gradient, 512, false>(rows, stream);
}

template <typename Stored, typename Gradient>
cudaError_t launch_pipelined(const RowsArgs& rows, cudaStream_t stream) {
  if constexpr (sizeof(Compute<Stored>) == 4) {
    const LaunchPlan& plan = rows.plan;
    const int64_t clusters = divide_up(rows.logits.logits.rows, plan.rows_per_cluster);
    return launch_with_all_shared(logits_rows_in_turn<Stored, Gradient>,
                                  clusters * plan.cluster_blocks, kPipelinedThreads,
                                  plan.shared_bytes, stream, rows, plan.cluster_blocks);
  }
  return cudaErrorInvalidValue;  // no plan asks for it
}

template <typename Stored, typename Gradient>
cudaError_t launch_streamed(const RowsArgs& rows, cudaStream_t stream) {
  const auto kernel = rows.logits.softcap == 0 ? logits_stream<Stored, Gradient, false>
                                               : logits_stream<Stored, Gradient, true>;
  return launch(kernel, rows.logits.logits.rows * rows.plan.stream_splits, kStreamThreads,
                kStorageBytes, stream, rows);
}

template <typename Stored>
cudaError_t launch_split(const RowsArgs& rows, cudaStream_t stream) {
  const auto kernel =
      rows.logits.softcap == 0 ? logits_parts<Stored, false> : logits_parts<Stored, true>;
  const cudaError_t error =
      launch_with_all_shared(kernel, rows.logits.logits.rows * rows.plan.splits, kSplitThreads,
                             rows.plan.shared_bytes, stream, rows);
  return error == cudaSuccess ? launch_streamed<Stored, Stored>(rows, stream) : error;
}

template <typename Stored, typename Gradient>
cudaError_t launch_planned(const RowsArgs& rows, cudaStream_t stream) {
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
