// The few things that CUDA spells in a way a host compiler cannot read: shared storage and the
// launch. All else in the kernels is plain C++ and CUDA's own functions, so the tests can run the
// same text without a GPU.
#pragma once

#include <cuda_runtime.h>

namespace ipo_ext::cuda {

// The block's shared memory as a T; a kernel has one, and its launch reserves sizeof(T).
template <typename T>
__device__ __forceinline__ T& shared_storage() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char storage[];
  return *reinterpret_cast<T*>(storage);
#else
  return *static_cast<T*>(simt::dynamic_shared_memory());
#endif
}

// Launches kernel<<<blocks, threads, shared_bytes, stream>>>(args).
template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Args& args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Null for success, else CUDA's words.
inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ipo_ext::cuda
