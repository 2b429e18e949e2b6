// The first launch where components stand beside the loss: it also adds their gradients to the
// loss's, and sums them over each tile.
#pragma once

#include "kernels/cuda/ipo_loss/tiles.cuh"

namespace ipo_ext::cuda {

struct MergeComponents {
  __device__ __forceinline__ ComponentTotals operator()(const ComponentTotals& a,
                                                        const ComponentTotals& b) const {
    return merge(a, b);
  }
};

template <typename E>
union ComponentStorage {
  TileStorage<E> tile;
  BlockReduceStorage<ComponentTotals, kThreads> components;
};

// Adds the components of the block's tile, whose gradients the block has written. All threads must
// call.
template <typename E>
__device__ __forceinline__ void add_components_of_tile(
    const IpoLossArgs& args, BlockReduceStorage<ComponentTotals, kThreads>& storage) {
  const ComponentParams<E> params = component_params_for<E>(args.components);
  const int64_t tile = blockIdx.x;
  const int64_t begin = tile * args.segments.tile_size();
  const int64_t left = args.segments.tokens - begin;
  const int64_t end = begin + (left < args.segments.tile_size() ? left : args.segments.tile_size());
  ComponentSums<E> sums = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const E gradient = add_components<E>(sums, component_token<E>(args, i), params);
    if (args.gradient != nullptr) static_cast<E*>(args.gradient)[i] += gradient;
  }
  const auto totals = block_reduce<kThreads>(to_totals(sums), MergeComponents(), storage);
  if (threadIdx.x == 0) Workspace<E>(args).components[tile] = totals;
}

// A thread takes one token at a time: with vectors of four the loss's own part would spill here.
template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Rules::kAny, E>)
    ipo_loss_tiles_with_components(const IpoLossArgs args) {
  auto& storage = shared_storage<ComponentStorage<E>>();
  process_tile<Rules::kAny, E, 1>(args, storage.tile);
  __syncthreads();  // thread 0 reads storage last, which is used again
  add_components_of_tile<E>(args, storage.components);
}

}  // namespace ipo_ext::cuda
