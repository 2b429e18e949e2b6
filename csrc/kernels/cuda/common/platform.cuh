// Shared memory, launches and what a launch must know of the device. With async.cuh and cluster.cuh
// this holds all that a host compiler cannot read; the rest of the kernels is plain C++ and CUDA's
// own functions, so the tests can run the same text without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace ipo_ext::cuda {

// Returns the block's shared memory as a T; a kernel has one, and its launch reserves sizeof(T).
template <typename T>
__device__ __forceinline__ T& shared_storage() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char storage[];
  return *reinterpret_cast<T*>(storage);
#else
  return *static_cast<T*>(emulator::dynamic_shared_memory());
#endif
}

// Makes the compiler load what lies in memory again, instead of keeping it in registers until then.
__device__ __forceinline__ void compiler_barrier() { asm volatile("" ::: "memory"); }

// Makes the compiler compute again what it has made of a value, instead of keeping both.
__device__ __forceinline__ void hide_from_compiler(uint4& word) {
  asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
}

// Makes the compiler keep a number in a register, instead of computing it again in every round.
__device__ __forceinline__ void keep_in_register(int& value) { asm volatile("" : "+r"(value)); }

// Programmatic dependent launch (PDL), for kernels that launch_pdl() launches: pdl_trigger() lets
// the next launch's blocks start once all of this one's have called it, and pdl_wait() holds a
// block until what the last launch writes is there. Before sm_90 launches never overlap.
__device__ __forceinline__ void pdl_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Launches kernel<<<blocks, threads, shared_bytes, stream>>>(args) with an attribute, or null.
template <typename Args>
cudaError_t launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Args), int64_t blocks,
                        int threads, size_t shared_bytes, cudaStream_t stream, const Args& args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute != nullptr ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Launches kernel<<<blocks, threads, shared_bytes, stream>>>(args) in clusters of that many blocks.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Args& args, int cluster_blocks = 1) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  return launch_with(cluster_blocks > 1 ? &cluster : nullptr, kernel, blocks, threads, shared_bytes,
                     stream, args);
}

// Returns whether a kernel that calls pdl_wait() was compiled to wait. Code for an older device,
// which a newer one may run, does not; and a driver before CUDA 12.3 may not be able to capture it.
template <typename Args>
bool supports_pdl(void (*kernel)(Args)) {
  constexpr int kCapturingDriver = 12030;
  constexpr int kWaitingCode = 90;
  int driver = 0;
  cudaFuncAttributes attributes = {};
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kCapturingDriver &&
         cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
         attributes.ptxVersion >= kWaitingCode;
}

// launch() whose blocks may start before the stream's last launch has ended; the kernel calls
// pdl_wait(). `may_overlap` is what supports_pdl() says of it.
template <typename Args>
cudaError_t launch_pdl(void (*kernel)(Args), int64_t blocks, int threads, size_t shared_bytes,
                       cudaStream_t stream, const Args& args, bool may_overlap) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(may_overlap ? &overlap : nullptr, kernel, blocks, threads, shared_bytes,
                     stream, args);
}

// What the choice of a kernel depends on.
struct Device {
  int capability = 0;  // 90 for sm_90
  int multiprocessors = 0;
  int shared_bytes = 0;           // that a block may ask for
  int shared_bytes_together = 0;  // of all blocks of a multiprocessor
  int shared_bytes_reserved = 0;  // in addition to what a block asks for
};

inline cudaError_t read_device(int index, Device& device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaSuccess;
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  get(major, cudaDevAttrComputeCapabilityMajor);
  get(minor, cudaDevAttrComputeCapabilityMinor);
  get(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(device.shared_bytes_together, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(device.shared_bytes_reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  device.capability = 10 * major + minor;
  return error;
}

// The current device, whose attributes are asked for once in the process.
inline cudaError_t current_device(Device& device) {
  static std::mutex mutex;
  static std::map<int, Device> known;  // by index
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) {
    device = found->second;
  } else if ((error = read_device(index, device)) == cudaSuccess) {
    known[index] = device;
  }
  return error;
}

// launch() of a kernel that may ask for as much shared memory as the device gives a block, and
// takes it from the L1 cache for as many blocks as possible. Saying so is no work for a stream, so
// a capture may do it; it is always the same for a device, so threads may race.
template <typename Args>
cudaError_t launch_with_all_shared(void (*kernel)(Args), int64_t blocks, int threads,
                                   size_t shared_bytes, int device_shared_bytes,
                                   cudaStream_t stream, const Args& args, int cluster_blocks = 1) {
  constexpr int kPercent = 100;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kPercent);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device_shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, blocks, threads, shared_bytes, stream, args, cluster_blocks);
}

// Returns null for success, else CUDA's words.
inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ipo_ext::cuda
