// What the device moves while threads go on: copies to shared memory, and words that are sent to
// other blocks of a cluster and counted where they arrive.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace ipo_ext::cuda {

// Starts to copy 16 aligned bytes to the block's shared memory, past L1. The copy is valid for the
// thread that asked alone, after its cp_async_wait_all(). Before sm_80 it is made at once.
__device__ __forceinline__ void cp_async(uint4* shared, const void* global) {
#if !defined(__CUDACC__)
  emulator::async_copy(shared, global, sizeof(uint4));
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  *shared = __ldcg(static_cast<const uint4*>(global));
#endif
}
__device__ __forceinline__ void cp_async_wait_all() {
#if !defined(__CUDACC__)
  emulator::async_commit();
  emulator::async_wait(0);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A barrier in shared memory (an mbarrier) that counts the bytes which blocks of the cluster send
// to this one: a phase is complete once as many have arrived as thread 0 has said to expect.
class TransactionBarrier {
 public:
  // Initialises the barrier: by thread 0, before any block may send.
  __device__ __forceinline__ void init() {
#if !defined(__CUDACC__)
    emulator::transaction_barrier_init(&state_);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&state_)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // Says how many bytes the phase has: by thread 0, once a phase. What it has written before is
  // there for all who wait.
  __device__ __forceinline__ void expect(unsigned bytes) {
#if !defined(__CUDACC__)
    emulator::transaction_barrier_expect(&state_, bytes);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&state_)),
                 "r"(bytes)
                 : "memory");
#endif
  }

  // Sends a value of 4, 8 or 16 bytes to where `to` lies in that block, and counts it there.
  template <typename S>
  __device__ __forceinline__ void send(S* to, const S& value, unsigned block) {
    static_assert(sizeof(S) == 4 || sizeof(S) == 8 || sizeof(S) == 16, "what one store sends");
#if !defined(__CUDACC__)
    emulator::transaction_barrier_send(emulator::map_shared(&state_, block),
                                       emulator::map_shared(to, block), &value, sizeof(S));
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

  // Waits until the phase of that number, counted from 0, is complete. What was sent to this block
  // is there then; the cluster's scope, which would empty L1, is not asked for.
  __device__ __forceinline__ void wait(unsigned phase) {
#if !defined(__CUDACC__)
    emulator::transaction_barrier_wait(&state_, phase % 2);
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

}  // namespace ipo_ext::cuda
