// Compiles the kernels for bf16 logits.
#include "kernels/cuda/logits/kernels.cuh"

namespace ipo_ext::cuda {

template cudaError_t launch_logits<BFloat16>(const LogitsArgs& args, const LaunchPlan& plan,
                                             cudaStream_t stream);

}  // namespace ipo_ext::cuda
