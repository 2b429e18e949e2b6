// Blocks that share a row: a thread-block cluster on sm_90 and newer, before that one block alone.
// A reduction sends every warp's value to every block, whose own barrier counts the bytes that
// arrive: nobody waits for anything but them, or reads a neighbour's memory, so a block may exit
// after its last reduction.
#pragma once

#include "kernels/cuda/common/async.cuh"
#include "kernels/cuda/common/reduce.cuh"

namespace ipo_ext::cuda {

constexpr int kMaxClusterBlocks = 8;  // what every device with clusters can place

struct Cluster {
  unsigned rank;
  unsigned blocks;

  // Tells the others that this block has started; nobody may write to one that has not. It orders
  // no memory.
  __device__ __forceinline__ void say_started() const {
    if (blocks == 1) return;
#if !defined(__CUDACC__)
    emulator::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive_relaxed();
#endif
  }
  __device__ __forceinline__ void wait_for_all() const {
    if (blocks == 1) return;
#if !defined(__CUDACC__)
    emulator::cluster_wait();
#elif __CUDA_ARCH__ >= 900
    __cluster_barrier_wait();
#endif
  }
};

__device__ __forceinline__ Cluster this_cluster() {
#if !defined(__CUDACC__)
  return {emulator::cluster_rank(), emulator::cluster_size()};
#elif __CUDA_ARCH__ >= 900
  return {__clusterRelativeBlockRank(), __clusterSizeInBlocks()};
#else
  return {0, 1};
#endif
}

// A value of every warp of the cluster. Each reduction needs one of its own, and may use it again
// after another reduction of the same threads.
template <typename S, int kThreads>
struct ClusterReduceStorage {
  alignas(16) S warps[kMaxClusterBlocks * kThreads / kWarpSize];
  Arrivals arrivals;
};

// Posts the warp's merged value to all blocks; all have arrived at its end. `phase` counts the
// reductions before it in this storage. All threads must call.
template <int kThreads, typename S, typename Merge>
__device__ __forceinline__ void post_to_cluster(S value, Merge merge, const Cluster& cluster,
                                                unsigned phase,
                                                ClusterReduceStorage<S, kThreads>& storage) {
  constexpr unsigned kWarps = kThreads / kWarpSize;
  value = warp_all_reduce(value, merge);
  const unsigned lane = threadIdx.x % kWarpSize;
  S* mine = &storage.warps[cluster.rank * kWarps + threadIdx.x / kWarpSize];
  if (cluster.blocks == 1) {
    if (lane == 0) *mine = value;
    return __syncthreads();
  }
  if (threadIdx.x == 0) storage.arrivals.expect(cluster.blocks * kWarps * sizeof(S));
  if (lane < cluster.blocks) storage.arrivals.send(mine, value, lane);
  storage.arrivals.wait(phase);
}

// What was posted, merged in a fixed tree; valid in all lanes of the warps that call.
template <int kThreads, typename S, typename Merge>
__device__ __forceinline__ S merge_posted(S value, Merge merge, const Cluster& cluster,
                                          const ClusterReduceStorage<S, kThreads>& storage) {
  const unsigned posted = cluster.blocks * (kThreads / kWarpSize);
  for (unsigned i = threadIdx.x % kWarpSize; i < posted; i += kWarpSize)
    value = merge(value, storage.warps[i]);
  return warp_all_reduce(value, merge);
}

}  // namespace ipo_ext::cuda
