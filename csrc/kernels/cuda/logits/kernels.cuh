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
    fill_row<E>(args, index, cluster.rank == 0, share, rows.steps,
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
__global__ void __launch_bounds__(kTurnThreads, kTurnBlocksTogether)
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
  const int64_t first = blockIdx.x / cluster.blocks * int64_t{rows.rows_in_turn};
  const int64_t end = min(first + rows.rows_in_turn, args.logits.rows);
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
      fill_row<E>(args, index, cluster.rank == 0, share, rows.steps,
                  gradient_of_row<Gradient>(args, index));
    }
    label = next_label;
  }
}

// Few rows: `parts` blocks for each, which leave what they found in the workspace.
template <typename Stored, bool kCapped>
__global__ void __launch_bounds__(kPartThreads, blocks_together(kPartThreads))
    logits_parts(const RowsArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kPartThreads>& storage = shared_storage<RowStorage<Stored, kPartThreads>>();
  const LogitsArgs& args = rows.logits;
  const int64_t index = blockIdx.x / rows.parts;
  if (!row_flows<E>(args, index)) return;
  RowShare<Stored, kPartThreads> share(args.logits.row<Stored>(index),
                                       static_cast<int>(args.logits.columns),
                                       blockIdx.x % rows.parts, rows.parts);
  const Cluster alone = {0, 1};
  HeldRow<Stored, kPartThreads, kCapped> held(rows, share, storage);
  const RowPart<E> part = reduce_row<kCapped, kPartThreads>(args, index, label_column(args, index),
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
  const int64_t index = blockIdx.x / rows.stream_parts;
  const int part = blockIdx.x % rows.stream_parts;
  Gradient* gradient = gradient_of_row<Gradient>(args, index);
  const RowShare<Stored, kStreamThreads> share(args.logits.row<Stored>(index),
                                               static_cast<int>(args.logits.columns), part,
                                               rows.stream_parts);
  if (!row_flows<E>(args, index))
    return fill_row<E>(args, index, part == 0, share, rows.stream_steps, gradient);
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
    const RowPart<E>* parts = static_cast<const RowPart<E>*>(args.workspace) + index * rows.parts;
    const RowPart<E> row = merge_parts(args, index, parts, rows.parts, storage);
    if (threadIdx.x == 0) {
      storage.scale = scale_of<E>(args, index);
      finish_row<kCapped>(args, index, row, part == 0, storage);
    }
  }
  if (gradient == nullptr) return;
  __syncthreads();
  const RowPlan<E> plan = storage.plan;
  if (plan.derivative.slopes.are_zero()) return share.fill(gradient, rows.stream_steps, E(0));
  stream_gradient<kCapped>(share, rows.stream_steps, plan, gradient);
  if (share.is_mine(label)) gradient[label] = narrow<Gradient>(plan.label);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

template <typename Stored, typename Gradient, int kThreads, bool kCapped>
cudaError_t launch_rows(const RowsArgs& rows, const RowSharing& sharing, const Device& device,
                        cudaStream_t stream) {
  const auto kernel = logits_rows<Stored, Gradient, kThreads, kCapped>;
  const cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  return launch(kernel, rows.logits.logits.rows * sharing.blocks, kThreads, sharing.shared_bytes,
                stream, rows, sharing.blocks);
}

template <typename Stored, typename Gradient>
cudaError_t launch_rows_in_turn(const RowsArgs& rows, const RowSharing& sharing,
                                const Device& device, cudaStream_t stream) {
  const auto kernel = logits_rows_in_turn<Stored, Gradient>;
  const cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  const int64_t clusters = divide_up(rows.logits.logits.rows, sharing.rows_in_turn);
  return launch(kernel, clusters * sharing.blocks, kTurnThreads, sharing.shared_bytes, stream, rows,
                sharing.blocks);
}

template <typename Stored, typename Gradient>
cudaError_t launch_stream(const RowsArgs& rows, cudaStream_t stream) {
  const auto kernel = rows.logits.softcap == 0 ? logits_stream<Stored, Gradient, false>
                                               : logits_stream<Stored, Gradient, true>;
  return launch(kernel, rows.logits.logits.rows * rows.stream_parts, kStreamThreads, kStorageBytes,
                stream, rows);
}

template <typename Stored>
cudaError_t launch_parts(RowsArgs rows, const RowSharing& sharing, const Device& device,
                         cudaStream_t stream) {
  const auto kernel =
      rows.logits.softcap == 0 ? logits_parts<Stored, false> : logits_parts<Stored, true>;
  cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  error = launch(kernel, rows.logits.logits.rows * rows.parts, kPartThreads, sharing.shared_bytes,
                 stream, rows);
  if (error != cudaSuccess) return error;
  if (rows.logits.gradient.data == nullptr) rows.stream_parts = 1;
  return launch_stream<Stored, Stored>(rows, stream);
}

template <typename Stored, typename Gradient>
cudaError_t launch_variant(const LogitsArgs& args, const Device& device, cudaStream_t stream) {
  const RowSharing sharing = sharing_of<Stored>(args, device);
  const RowsArgs rows = {args,
                         sharing.steps,
                         sharing.shared_steps,
                         sharing.parts,
                         sharing.stream_parts,
                         sharing.stream_steps,
                         sharing.rows_in_turn};
  if (is_backward(args)) return launch_stream<Stored, Gradient>(rows, stream);
  if (sharing.parts > 0) return launch_parts<Stored>(rows, sharing, device, stream);
  if constexpr (sizeof(Compute<Stored>) == 4) {
    if (sharing.rows_in_turn > 0)
      return launch_rows_in_turn<Stored, Gradient>(rows, sharing, device, stream);
  }
  if (args.softcap != 0)
    return launch_rows<Stored, Gradient, kCappedThreads, true>(rows, sharing, device, stream);
  return sharing.threads == 256
             ? launch_rows<Stored, Gradient, 256, false>(rows, sharing, device, stream)
             : launch_rows<Stored, Gradient, 512, false>(rows, sharing, device, stream);
}

template <typename Stored>
cudaError_t launch_logits(const LogitsArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return dispatch_gradient<Stored>(args.gradient.dtype, [&](auto gradient) {
    return launch_variant<Stored, TypeOf<decltype(gradient)>>(args, device, stream);
  });
}

}  // namespace ipo_ext::cuda
