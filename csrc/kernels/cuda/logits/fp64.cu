// Tier 2's kernels for fp64 logits.
#include "kernels/cuda/logits/kernels.cuh"

namespace ipo_ext::cuda {

template cudaError_t launch_logits<double>(const LogitsArgs& args, cudaStream_t stream);

}  // namespace ipo_ext::cuda
