// The host's side of CUDA over the emulator: launch checks like the driver's, error state, device
// and kernel attributes. There are no streams: everything is done before the call returns.
#include <array>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "include/cuda_runtime.h"

namespace {

constexpr std::size_t kDefaultSharedBytes = 48 << 10;
constexpr int kMaxSharedBytes = 227 << 10;
constexpr unsigned kPortableClusterBlocks = 8;
constexpr unsigned kMaxClusterBlocks = 16;

struct KernelAttributes {
  std::size_t max_shared_bytes = kDefaultSharedBytes;
  bool nonportable_clusters = false;
};

// An imagined sm_90 with few multiprocessors, so that persistent grids stay small.
const std::map<int, int> kDeviceDefaults = {
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxSharedMemoryPerBlock, static_cast<int>(kDefaultSharedBytes)},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMultiProcessorCount, 4},
    {cudaDevAttrL2CacheSize, 50 << 20},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, kMaxSharedBytes},
    {cudaDevAttrReservedSharedMemoryPerBlock, 1 << 10},
    {cudaDevAttrClusterLaunch, 1},
};

std::mutex mutex;  // guards what follows
// A device never changes, and programs may remember what it is: each change of an attribute makes a
// new device, which is the current one from then on.
std::vector<std::map<int, int>> devices = {kDeviceDefaults};
std::map<const void*, KernelAttributes> kernel_attributes;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

KernelAttributes attributes_of(const void* kernel) {
  const std::lock_guard lock(mutex);
  const auto found = kernel_attributes.find(kernel);
  return found == kernel_attributes.end() ? KernelAttributes{} : found->second;
}

bool within(dim3 value, unsigned x, unsigned y, unsigned z) {
  return value.x >= 1 && value.x <= x && value.y >= 1 && value.y <= y && value.z >= 1 &&
         value.z <= z;
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    return {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
  }
  return {1, 1, 1};
}

cudaError_t check_cluster(dim3 cluster, dim3 grid, const KernelAttributes& kernel) {
  const unsigned most = kernel.nonportable_clusters ? kMaxClusterBlocks : kPortableClusterBlocks;
  if (!within(cluster, most, most, most)) return cudaErrorInvalidClusterSize;
  if (cluster.x * cluster.y * cluster.z > most) return cudaErrorInvalidClusterSize;
  const bool divides =
      grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
  return divides ? cudaSuccess : cudaErrorInvalidClusterSize;
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const KernelAttributes& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!within(grid, 0x7fffffffu, 65535, 65535)) return cudaErrorInvalidConfiguration;
  if (!within(block, 1024, 1024, 64)) return cudaErrorInvalidConfiguration;
  if (block.x * block.y * block.z > 1024) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > kernel.max_shared_bytes) return cudaErrorInvalidValue;
  return check_cluster(cluster_of(config), grid, kernel);
}

}  // namespace

namespace emulator {

cudaError_t launch(const cudaLaunchConfig_t& config, Grid grid) {
  const cudaError_t status = check_launch(config, attributes_of(grid.kernel));
  if (status != cudaSuccess) return remember(status);
  grid.blocks = config.gridDim;
  grid.threads = config.blockDim;
  grid.cluster = cluster_of(config);
  grid.shared_bytes = config.dynamicSmemBytes;
  run(grid);
  return cudaSuccess;
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(mutex);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > kMaxSharedBytes) return remember(cudaErrorInvalidValue);
      kernel_attributes[kernel].max_shared_bytes = static_cast<std::size_t>(value);
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      kernel_attributes[kernel].nonportable_clusters = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t max_active_clusters(int* clusters, const void* kernel,
                                const cudaLaunchConfig_t& config) {
  *clusters = 0;
  const cudaError_t status = check_launch(config, attributes_of(kernel));
  if (status == cudaSuccess) *clusters = 1;
  return remember(status);
}

cudaError_t max_active_blocks(int* blocks, const void* kernel, int threads,
                              std::size_t shared_bytes) {
  *blocks = 0;
  if (threads < 1 || threads > 1024) return remember(cudaErrorInvalidValue);
  if (shared_bytes <= attributes_of(kernel).max_shared_bytes) *blocks = 2048 / threads;
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard lock(mutex);
  *device = static_cast<int>(devices.size()) - 1;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12030;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  int current = 0;
  cudaGetDevice(&current);
  return remember(device == current ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const std::lock_guard lock(mutex);
  if (device < 0 || static_cast<std::size_t>(device) >= devices.size())
    return remember(cudaErrorInvalidDevice);
  const auto found = devices[device].find(attribute);
  if (found == devices[device].end()) return remember(cudaErrorInvalidValue);
  *value = found->second;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int byte, std::size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(pointer, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

extern "C" void emulator_set_device_attribute(int attribute, int value) {
  const std::lock_guard lock(mutex);
  std::map<int, int> device = devices.back();
  if (value >= 0) {
    device[attribute] = value;
  } else if (const auto normal = kDeviceDefaults.find(attribute); normal != kDeviceDefaults.end()) {
    device[attribute] = normal->second;
  } else {
    device.erase(attribute);
  }
  devices.push_back(device);
}
