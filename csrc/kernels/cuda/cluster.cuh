// Blocks that share a row: a thread-block cluster on sm_90 and newer, before that one block alone.
// A reduction sends every warp's value to every block, whose own barrier counts the bytes that
// arrive: nobody waits for anything but them, or reads a neighbour's memory, so a block may exit
// after its last reduction.
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

// Counts bytes that other blocks send to this one: a phase is complete once as many have arrived as
// thread 0 has said to expect. Lies in shared memory.
class Arrivals {
 public:
  // By thread 0, before any block may send.
  __device__ __forceinline__ void prepare() {
#if !defined(__CUDACC__)
    emulator::arrivals_init(&state_);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&state_)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // By thread 0, once a phase; what it has written before is there for all who wait.
  __device__ __forceinline__ void expect(unsigned bytes) {
#if !defined(__CUDACC__)
    emulator::arrivals_expect(&state_, bytes);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&state_)),
                 "r"(bytes)
                 : "memory");
#endif
  }

  // To where `to` lies in that block, 4, 8 or 16 bytes of them.
  template <typename S>
  __device__ __forceinline__ void send(S* to, const S& value, unsigned block) {
    static_assert(sizeof(S) == 4 || sizeof(S) == 8 || sizeof(S) == 16, "what one store sends");
#if !defined(__CUDACC__)
    emulator::arrivals_send(emulator::map_shared(&state_, block), emulator::map_shared(to, block),
                            &value, sizeof(S));
#elif __CUDA_ARCH__ >= 900
    const unsigned there = address_in(to, block), counter = address_in(&state_, block);
    if constexpr (sizeof(S) == 4) {
      uint32_t word;
      memcpy(&word, &value, sizeof(S));
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
          "r"(word), "r"(counter)
          : "memory");
    } else if constexpr (sizeof(S) == 8) {
      uint64_t word;
      memcpy(&word, &value, sizeof(S));
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(there),
          "l"(word), "r"(counter)
          : "memory");
    } else {
      uint64_t words[2];
      memcpy(words, &value, sizeof(S));
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%0], {%1, %2}, [%3];" ::
              "r"(there),
          "l"(words[0]), "l"(words[1]), "r"(counter)
          : "memory");
    }
#endif
  }

  // Until the phase of that number, counted from 0, is complete. What was sent to this block is
  // there then; the cluster's scope, which would empty L1, is not asked for.
  __device__ __forceinline__ void wait(unsigned phase) {
#if !defined(__CUDACC__)
    emulator::arrivals_wait(&state_, phase % 2);
#elif __CUDA_ARCH__ >= 900
    unsigned complete = 0;
    while (!complete) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(complete)
          : "r"(address(&state_)), "r"(phase % 2)
          : "memory");
    }
#endif
  }

 private:
#if defined(__CUDACC__)
  static __device__ __forceinline__ unsigned address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
  }
#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ unsigned address_in(const void* mine, unsigned block) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(mine)), "r"(block));
    return there;
  }
#endif
#endif

  uint64_t state_;
};

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
