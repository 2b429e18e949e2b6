// What the kernels use of <cuda_runtime.h>, for the host compiler: found first on the include
// path, it sends every CUDA builtin to the emulator and needs no CUDA toolkit.
//
// Not here on purpose: __shared__ (shared memory is dynamic, through one helper), the launch
// syntax, cooperative groups and inline PTX. A kernel that uses one of them does not compile.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <utility>

#include "../emulator.h"
#include "vector_types.h"

// ---------------------------------------------------------------------------------------------
// Qualifiers

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// ---------------------------------------------------------------------------------------------
// Indices

using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------
// Barriers and votes: the call's own source line is part of what threads must agree on.

inline void __syncthreads(EMULATOR_SITE_PARAMETERS) {
  emulator::block_rendezvous(emulator::Operation::block_barrier, 0, {file, line});
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE_PARAMETERS) {
  return emulator::block_rendezvous(emulator::Operation::block_barrier_count, predicate,
                                    {file, line});
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE_PARAMETERS) {
  return emulator::block_rendezvous(emulator::Operation::block_barrier_or, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE_PARAMETERS) {
  return emulator::block_rendezvous(emulator::Operation::block_barrier_and, predicate,
                                    {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE_PARAMETERS) {
  emulator::warp_rendezvous(emulator::Operation::warp_barrier, mask, 0, 0, 32, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE_PARAMETERS) {
  return static_cast<unsigned>(emulator::warp_rendezvous(emulator::Operation::ballot, mask,
                                                         predicate != 0, 0, 32, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE_PARAMETERS) {
  return static_cast<int>(emulator::warp_rendezvous(emulator::Operation::any, mask, predicate != 0,
                                                    0, 32, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE_PARAMETERS) {
  return static_cast<int>(emulator::warp_rendezvous(emulator::Operation::all, mask, predicate != 0,
                                                    0, 32, {file, line}));
}
// CUDA promises the caller's own lane and nothing more; neither does this.
inline unsigned __activemask() { return 1u << emulator::lane(); }

// ---------------------------------------------------------------------------------------------
// Shuffles

namespace emulator {
template <typename T>
T shuffle(Operation operation, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 32-bit and 64-bit arithmetic types");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_rendezvous(operation, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE_PARAMETERS) {
  return emulator::shuffle(emulator::Operation::shuffle, mask, value, source, width, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE_PARAMETERS) {
  return emulator::shuffle(emulator::Operation::shuffle_up, mask, value, static_cast<int>(delta),
                           width, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   EMULATOR_SITE_PARAMETERS) {
  return emulator::shuffle(emulator::Operation::shuffle_down, mask, value, static_cast<int>(delta),
                           width, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_SITE_PARAMETERS) {
  return emulator::shuffle(emulator::Operation::shuffle_xor, mask, value, lane_mask, width,
                           {file, line});
}

// ---------------------------------------------------------------------------------------------
// Memory: one OS thread runs all fibres and nothing interrupts them between rendezvous, so
// fences are empty and atomics are plain arithmetic. Their order is the schedule's.

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

#define EMULATOR_ATOMIC(name, type, updated)                \
  inline type name(type* address, type operand) {           \
    const type old = *static_cast<volatile type*>(address); \
    *static_cast<volatile type*>(address) = (updated);      \
    return old;                                             \
  }
#define EMULATOR_INTEGER_ATOMICS(type)                                    \
  EMULATOR_ATOMIC(atomicMax, type, old > operand ? old : operand)         \
  EMULATOR_ATOMIC(atomicMin, type, old < operand ? old : operand)         \
  EMULATOR_ATOMIC(atomicAnd, type, old& operand)                          \
  EMULATOR_ATOMIC(atomicOr, type, old | operand)                          \
  EMULATOR_ATOMIC(atomicXor, type, old ^ operand)                         \
  EMULATOR_ATOMIC(atomicExch, type, operand)                              \
  inline type atomicCAS(type* address, type expected, type desired) {     \
    const type old = *static_cast<volatile type*>(address);               \
    if (old == expected) *static_cast<volatile type*>(address) = desired; \
    return old;                                                           \
  }
EMULATOR_INTEGER_ATOMICS(int)
EMULATOR_INTEGER_ATOMICS(unsigned int)
EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + operand))
EMULATOR_ATOMIC(atomicAdd, unsigned int, old + operand)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, old + operand)
EMULATOR_ATOMIC(atomicAdd, float, old + operand)
EMULATOR_ATOMIC(atomicAdd, double, old + operand)
EMULATOR_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - operand))
EMULATOR_ATOMIC(atomicSub, unsigned int, old - operand)
EMULATOR_ATOMIC(atomicExch, float, operand)
#undef EMULATOR_INTEGER_ATOMICS
#undef EMULATOR_ATOMIC

// ---------------------------------------------------------------------------------------------
// Bits and arithmetic

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}

namespace emulator {
template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace emulator

inline unsigned __float_as_uint(float value) { return emulator::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return emulator::bit_cast<int>(value); }
inline float __uint_as_float(unsigned value) { return emulator::bit_cast<float>(value); }
inline float __int_as_float(int value) { return emulator::bit_cast<float>(value); }
inline long long __double_as_longlong(double value) { return emulator::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return emulator::bit_cast<double>(value); }

// Rounded on their own: the compiler must not fuse them (build with -ffp-contract=off).
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }

#define EMULATOR_MIN_MAX(type)                                 \
  constexpr type min(type a, type b) { return b < a ? b : a; } \
  constexpr type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned int)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }  // as CUDA's: a NaN loses
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

[[noreturn]] inline void __trap(EMULATOR_SITE_PARAMETERS) { emulator::trap({file, line}); }

// ---------------------------------------------------------------------------------------------
// The host's side

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
using cudaStream_t = struct CUstream_st*;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 15,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  char pad[64];
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDriverGetVersion(int* version);
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* pointer, int byte, std::size_t bytes, cudaStream_t stream = {});
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = {});
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

namespace emulator {
cudaError_t launch(const cudaLaunchConfig_t& config, Grid grid);
cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t max_active_clusters(int* clusters, const void* kernel,
                                const cudaLaunchConfig_t& config);
cudaError_t max_active_blocks(int* blocks, const void* kernel, int threads,
                              std::size_t shared_bytes);
}  // namespace emulator

// Runs the grid before it returns. Throws emulator::Fault when a kernel breaks a rule.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  emulator::Grid grid{};
  grid.kernel = reinterpret_cast<const void*>(kernel);
  grid.signature = typeid(kernel).name();
  grid.arguments = &call;
  grid.body = [](const void* bytes) {
    const Call& each = *static_cast<const Call*>(bytes);
    std::apply(each.kernel, each.arguments);
  };
  return emulator::launch(*config, grid);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return emulator::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel,
                                           const cudaLaunchConfig_t* config) {
  return emulator::max_active_clusters(clusters, reinterpret_cast<const void*>(kernel), *config);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads,
                                                          std::size_t shared_bytes) {
  return emulator::max_active_blocks(blocks, reinterpret_cast<const void*>(kernel), threads,
                                     shared_bytes);
}
