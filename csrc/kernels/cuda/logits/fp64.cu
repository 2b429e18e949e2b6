// Compiles the kernels for fp64 logits.
#include "kernels/cuda/logits/kernels.cuh"

namespace ipo_ext::cuda {

template cudaError_t launch_logits<double>(const LogitsArgs& args, const LaunchPlan& plan,
                                           cudaStream_t stream);

}  // namespace ipo_ext::cuda
