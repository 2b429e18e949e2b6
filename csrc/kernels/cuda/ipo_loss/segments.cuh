// Answers which of the packed sequences a tile's first token belongs to.
#pragma once

#include "kernels/cuda/common/reduce.cuh"
#include "kernels/ipo_loss.h"

namespace ipo_ext::cuda {

constexpr int kThreads = 256;  // of every block of these kernels
constexpr int kWarpsOfBlock = kThreads / kWarpSize;

// Loads what a thread needs in a round of the search below: where one of so many candidates begins.
__device__ __forceinline__ int32_t probe_segments(const Segments& segments, int64_t first,
                                                  int64_t candidates) {
  const int64_t probe = threadIdx.x * ((candidates + kThreads - 1) / kThreads);
  return candidates > 1 && probe < candidates ? segments.cu_seqlens[first + probe] : 0;
}

// Returns the last segment that begins at or before `token`, to all threads of the block, all of
// which must call. Each round every thread probes one candidate, so 256 segments take one round of
// loads, which the caller has made before, and 65,536 take two.
__device__ __forceinline__ int64_t block_segment_of(const Segments& segments, int64_t token,
                                                    int32_t probed) {
  int64_t first = 0;
  int64_t candidates = segments.count;
  while (candidates > 1) {
    const int64_t stride = (candidates + kThreads - 1) / kThreads;
    const bool begun = threadIdx.x * stride < candidates && probed <= token;
    const int begun_probes = __syncthreads_count(begun);
    const int64_t skipped = begun_probes > 0 ? (begun_probes - 1) * stride : 0;
    first += skipped;
    candidates = candidates - skipped < stride ? candidates - skipped : stride;
    probed = probe_segments(segments, first, candidates);
  }
  return first;
}

// The same to all lanes of a warp, all of which must call: 32 candidates a round.
__device__ __forceinline__ int64_t warp_segment_of(const Segments& segments, int64_t token) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t first = 0;
  int64_t candidates = segments.count;
  while (candidates > 1) {
    const int64_t stride = (candidates + kWarpSize - 1) / kWarpSize;
    const int64_t probe = lane * stride;
    const bool begun = probe < candidates && segments.cu_seqlens[first + probe] <= token;
    const int begun_probes = __popc(__ballot_sync(kFullWarp, begun));
    const int64_t skipped = begun_probes > 0 ? (begun_probes - 1) * stride : 0;
    first += skipped;
    candidates = candidates - skipped < stride ? candidates - skipped : stride;
  }
  return first;
}

}  // namespace ipo_ext::cuda
