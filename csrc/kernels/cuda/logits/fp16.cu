// Compiles the kernels for fp16 logits.
#include "kernels/cuda/logits/kernels.cuh"

namespace ipo_ext::cuda {

template cudaError_t launch_logits<Float16>(const LogitsArgs& args, const LaunchPlan& plan,
                                            cudaStream_t stream);

}  // namespace ipo_ext::cuda
