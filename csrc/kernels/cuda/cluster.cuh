// Blocks that share a row: a thread-block cluster on sm_90 and newer, before that one block alone.
// A reduction posts every warp's value to every block before one barrier, and nobody reads a
// neighbour's memory: so a block may exit after the last barrier, and no final one is needed.
#pragma once

#include "kernels/cuda/reduce.cuh"

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
    simt::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive_relaxed();
#endif
  }
  __device__ __forceinline__ void wait_for_all() const {
    if (blocks == 1) return;
#if !defined(__CUDACC__)
    simt::cluster_wait();
#elif __CUDA_ARCH__ >= 900
    __cluster_barrier_wait();
#endif
  }

  // For all threads of all blocks.
  __device__ __forceinline__ void synchronize() const {
    if (blocks == 1) return __syncthreads();
#if !defined(__CUDACC__)
    simt::cluster_sync();
#elif __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
#endif
  }

  // Where `mine` lies in the shared memory of the block of that rank.
  template <typename T>
  __device__ __forceinline__ T* of_block(T* mine, unsigned block) const {
#if !defined(__CUDACC__)
    return simt::map_shared(mine, block);
#elif __CUDA_ARCH__ >= 900
    return static_cast<T*>(__cluster_map_shared_rank(mine, block));
#else
    return mine;
#endif
  }
};

__device__ __forceinline__ Cluster this_cluster() {
#if !defined(__CUDACC__)
  return {simt::cluster_rank(), simt::cluster_size()};
#elif __CUDA_ARCH__ >= 900
  return {__clusterRelativeBlockRank(), __clusterSizeInBlocks()};
#else
  return {0, 1};
#endif
}

// A value of every warp of the cluster. Each reduction needs one of its own.
template <typename S, int kThreads>
struct ClusterReduceStorage {
  S warps[kMaxClusterBlocks * kThreads / kWarpSize];
};

// Posts the warp's merged value to all blocks; complete after the barrier at its end. All threads
// must call.
template <int kThreads, typename S, typename Merge>
__device__ __forceinline__ void post_to_cluster(S value, Merge merge, const Cluster& cluster,
                                                ClusterReduceStorage<S, kThreads>& storage) {
  constexpr unsigned kWarps = kThreads / kWarpSize;
  value = warp_all_reduce(value, merge);
  const unsigned lane = threadIdx.x % kWarpSize;
  S* mine = &storage.warps[cluster.rank * kWarps + threadIdx.x / kWarpSize];
  if (cluster.blocks == 1) {
    if (lane == 0) *mine = value;
  } else if (lane < cluster.blocks) {
    *cluster.of_block(mine, lane) = value;
  }
  cluster.synchronize();
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
