// Reductions over the blocks that work on one row: a thread-block cluster on sm_90 and newer,
// before that one block alone. Every warp's value is sent to every block (DSMEM, st.async), whose
// own barrier counts the bytes that arrive: nobody waits for anything but them, or reads a
// neighbour's memory, so a block may exit after its last reduction.
#pragma once

#include "kernels/cuda/common/async.cuh"
#include "kernels/cuda/common/reduce.cuh"

namespace ipo_ext::cuda {

constexpr int kMaxClusterBlocks = 8;  // what every device with clusters can place

struct Cluster {
  unsigned rank;
  unsigned blocks;

  // arrive() tells the others that this block has started, wait() waits until all have: nobody may
  // write to one that has not. They order no memory.
  __device__ __forceinline__ void arrive() const {
    if (blocks == 1) return;
#if !defined(__CUDACC__)
    emulator::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive_relaxed();
#endif
  }
  __device__ __forceinline__ void wait() const {
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

// Has room for a value of every warp of the cluster. Each reduction needs a storage of its own, and
// may use it again after another reduction of the same threads.
template <typename S, int kThreads>
struct ClusterReduceStorage {
  alignas(16) S warps[kMaxClusterBlocks * kThreads / kWarpSize];
  TransactionBarrier barrier;
};

// Sends each warp's merged value to all blocks. At its end `storage` holds the values of all warps
// of the cluster, for all threads of the block. `phase` counts the reductions before it in this
// storage. All threads of all blocks must call.
template <int kThreads, typename S, typename Merge>
__device__ __forceinline__ void cluster_all_gather(S value, Merge merge, const Cluster& cluster,
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
  if (threadIdx.x == 0) storage.barrier.expect(cluster.blocks * kWarps * sizeof(S));
  if (lane < cluster.blocks) storage.barrier.send(mine, value, lane);
  storage.barrier.wait(phase);
}

// Merges what cluster_all_gather() has left in a fixed tree, which starts from `value`. The result
// is valid in all lanes of the warps that call.
template <int kThreads, typename S, typename Merge>
__device__ __forceinline__ S reduce_gathered(S value, Merge merge, const Cluster& cluster,
                                             const ClusterReduceStorage<S, kThreads>& storage) {
  const unsigned gathered = cluster.blocks * (kThreads / kWarpSize);
  for (unsigned i = threadIdx.x % kWarpSize; i < gathered; i += kWarpSize)
    value = merge(value, storage.warps[i]);
  return warp_all_reduce(value, merge);
}

}  // namespace ipo_ext::cuda
