// Compiles the kernels for fp32 logits, with gradients of their own dtype or a narrower one.
#include "kernels/cuda/logits/kernels.cuh"

namespace ipo_ext::cuda {

template cudaError_t launch_logits<float>(const LogitsArgs& args, const LaunchPlan& plan,
                                          cudaStream_t stream);

}  // namespace ipo_ext::cuda
