// What the emulator promises of CUDA's builtins, checked against their definitions, kernel by
// kernel: a check never compares the emulator with itself.
//
//   builtins NAME [--seed N]
//
// exits 1 and prints the first condition that does not hold.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace builtins {

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      throw std::runtime_error("line " + std::to_string(__LINE__) + ": " #condition); \
    }                                                                                 \
  } while (false)

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   dim3 cluster, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster.x;
  attribute.val.clusterDim.y = cluster.y;
  attribute.val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename T>
T* shared() {
  return static_cast<T*>(emulator::dynamic_shared_memory());
}

// ---------------------------------------------------------------------------------------------

__global__ void record_indices(uint3* threads, uint3* blocks) {
  const unsigned block =
      blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * static_cast<unsigned>(blockIdx.z));
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  threads[i] = threadIdx;
  blocks[i] = blockIdx;
}

void indices() {
  const dim3 grid(3, 4, 2), block(5, 3, 7);
  std::vector<uint3> threads(24 * 105), blocks(24 * 105);
  CHECK(launch(record_indices, grid, block, 0, dim3(3, 2, 1), threads.data(), blocks.data()) ==
        cudaSuccess);
  std::size_t i = 0;
  for (unsigned z = 0; z < 2; ++z)
    for (unsigned y = 0; y < 4; ++y)
      for (unsigned x = 0; x < 3; ++x)
        for (unsigned t = 0; t < 105; ++t, ++i) {
          CHECK(blocks[i].x == x && blocks[i].y == y && blocks[i].z == z);
          CHECK(threads[i].x == t % 5 && threads[i].y == t / 5 % 3 && threads[i].z == t / 15);
        }
}

// ---------------------------------------------------------------------------------------------

__global__ void shuffle_all(int width, int operand, double* out) {
  const double value = 100.0 + threadIdx.x;
  const unsigned delta = static_cast<unsigned>(operand);
  double* row = out + 4 * threadIdx.x;
  row[0] = __shfl_sync(kAllLanes, value, operand, width);
  row[1] = __shfl_up_sync(kAllLanes, value, delta, width);
  row[2] = __shfl_down_sync(kAllLanes, value, delta, width);
  row[3] = __shfl_xor_sync(kAllLanes, value, operand, width);
}

void shuffles() {
  std::vector<double> out(64 * 4);
  for (int width = 1; width <= 32; width *= 2) {
    for (int operand = 0; operand < 32; ++operand) {
      CHECK(launch(shuffle_all, 1, 64, 0, 1, width, operand, out.data()) == cudaSuccess);
      for (int t = 0; t < 64; ++t) {
        const int segment = t / width * width, place = t % width;  // segments never span warps
        const double own = 100.0 + t;
        const double* row = out.data() + 4 * t;
        CHECK(row[0] == 100.0 + segment + operand % width);
        CHECK(row[1] == (place >= operand ? own - operand : own));
        CHECK(row[2] == (place + operand < width ? own + operand : own));
        const int flipped = t % 32 ^ operand;
        const bool beyond = flipped > segment % 32 + width - 1;
        CHECK(row[3] == (beyond ? own : 100.0 + t / 32 * 32 + flipped));
      }
    }
  }
}

__global__ void shuffle_types(int* ok) {
  const unsigned next = (threadIdx.x + 1) % 32;
  const int lane = static_cast<int>(next);
  bool good = __shfl_sync(kAllLanes, -static_cast<int>(threadIdx.x), lane) == -lane;
  good &= __shfl_sync(kAllLanes, 0.5f + threadIdx.x, lane) == 0.5f + next;
  good &= __shfl_sync(kAllLanes, ~0ull - threadIdx.x, lane) == ~0ull - next;
  ok[threadIdx.x] = good;
}

void shuffled_types() {
  std::vector<int> ok(32);
  CHECK(launch(shuffle_types, 1, 32, 0, 1, ok.data()) == cudaSuccess);
  CHECK(std::accumulate(ok.begin(), ok.end(), 0) == 32);
}

// ---------------------------------------------------------------------------------------------

// Two halves of a warp vote on their own; a warp of 16 threads is complete without the rest.
__global__ void vote_by_halves(unsigned* out) {
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const int odd = threadIdx.x & 1;
  unsigned* row = out + 4 * threadIdx.x;
  row[0] = __ballot_sync(half, odd);
  row[1] = static_cast<unsigned>(__any_sync(half, threadIdx.x % 32 == 3));
  row[2] = static_cast<unsigned>(__all_sync(half, threadIdx.x % 32 < 16));
  __syncwarp(half);
  row[3] = __activemask() >> (threadIdx.x % 32) & 1u;
}

void votes() {
  std::vector<unsigned> out(48 * 4);
  CHECK(launch(vote_by_halves, 1, 48, 0, 1, out.data()) == cudaSuccess);
  for (unsigned t = 0; t < 48; ++t) {
    const bool low = t % 32 < 16;
    CHECK(out[4 * t] == (low ? 0x0000aaaau : 0xaaaa0000u));
    CHECK(out[4 * t + 1] == (low ? 1u : 0u));
    CHECK(out[4 * t + 2] == (low ? 1u : 0u));
    CHECK(out[4 * t + 3] == 1u);
  }
}

__global__ void vote_by_block(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  int* row = out + 4 * t;
  row[0] = __syncthreads_count(t % 3 == 0);
  row[1] = __syncthreads_or(t == 70);
  row[2] = __syncthreads_and(t != 70);
  row[3] = __syncthreads_and(1);
}

void block_votes() {
  std::vector<int> out(96 * 4);
  CHECK(launch(vote_by_block, 1, 96, 0, 1, out.data()) == cudaSuccess);
  for (int t = 0; t < 96; ++t) {
    const int* row = out.data() + 4 * t;
    CHECK(row[0] == 32 && row[1] == 1 && row[2] == 0 && row[3] == 1);
  }
}

// ---------------------------------------------------------------------------------------------

template <typename T>
__global__ void apply_atomics(T* cells) {
  const T value = static_cast<T>(threadIdx.x + 1);
  atomicAdd(&cells[0], value);
  if constexpr (std::is_integral_v<T>) {
    atomicMax(&cells[1], value);
    atomicMin(&cells[2], value);
    if (atomicCAS(&cells[3], T{0}, value) == 0) atomicExch(&cells[4], value);
  }
}

template <typename T>
void check_atomics() {
  std::vector<T> cells = {0, 0, 100, 0, 0};
  CHECK(launch(apply_atomics<T>, 1, 64, 0, 1, cells.data()) == cudaSuccess);
  CHECK(cells[0] == T{64 * 65 / 2});
  if constexpr (std::is_integral_v<T>) {
    CHECK(cells[1] == 64 && cells[2] == 1 && cells[3] != 0 && cells[3] == cells[4]);
  }
}

void atomics() {
  check_atomics<int>();
  check_atomics<unsigned>();
  check_atomics<unsigned long long>();
  check_atomics<float>();
  check_atomics<double>();
}

// ---------------------------------------------------------------------------------------------

__global__ void look_at_shared(int* ok, std::size_t bytes) {
  const auto* start = shared<unsigned char>();
  bool good = reinterpret_cast<std::uintptr_t>(start) % 1024 == 0;
  for (std::size_t i = 0; i < bytes; ++i) good &= start[i] == 0xA5;
  ok[blockIdx.x] = good;
  shared<unsigned char>()[0] = 1;  // the next block must not see it
}

void shared_memory() {
  emulator::set_poison(0xA5);
  std::vector<int> ok(3);
  CHECK(launch(look_at_shared, 3, 1, 1001, 1, ok.data(), std::size_t{1001}) == cudaSuccess);
  CHECK(ok[0] && ok[1] && ok[2]);
}

// ---------------------------------------------------------------------------------------------

// Ring exchange: arrive, do other work, wait; then read the neighbour's and hold still.
__global__ void exchange(int* out) {
  int* box = shared<int>();
  const unsigned rank = emulator::cluster_rank(), size = emulator::cluster_size();
  emulator::cluster_sync();
  if (threadIdx.x == 0) box[0] = static_cast<int>(blockIdx.x) + 1;
  emulator::cluster_arrive();
  const unsigned next = (rank + 1) % size;
  emulator::cluster_wait();
  if (threadIdx.x == 0) out[blockIdx.x] = *emulator::map_shared(box, next);
  emulator::cluster_sync();
}

void clusters() {
  std::vector<int> out(24);
  for (unsigned size : {1u, 2u, 8u}) {
    CHECK(launch(exchange, 24, 40, 16, size, out.data()) == cudaSuccess);
    for (unsigned b = 0; b < 24; ++b) {
      CHECK(out[b] == static_cast<int>(b / size * size + (b + 1) % size) + 1);
    }
  }
}

// ---------------------------------------------------------------------------------------------

__global__ void pipeline(const float4* in, float* out) {
  float4* stage = shared<float4>();
  for (int i = 0; i < 2; ++i) {
    emulator::async_copy(&stage[i], &in[i], 16);
    emulator::async_commit();
  }
  out[0] = stage[0].x;  // nothing has landed
  emulator::async_wait(1);
  out[1] = stage[0].x;
  out[2] = stage[1].x;  // the second group is still under way
  emulator::async_wait(0);
  out[3] = stage[1].x;
}

void asynchronous_copies() {
  const std::vector<float4> in = {{1, 0, 0, 0}, {2, 0, 0, 0}};
  std::vector<float> out(4);
  CHECK(launch(pipeline, 1, 1, 32, 1, in.data(), out.data()) == cudaSuccess);
  CHECK(out[0] != out[0] && out[1] == 1 && out[2] != out[2] && out[3] == 2);
}

// ---------------------------------------------------------------------------------------------

__global__ void nothing() {}
__global__ void nothing_wide() {}

void launch_checks() {
  constexpr std::size_t kKiB = 1024;
  CHECK(launch(nothing, 0, 32, 0, 1) == cudaErrorInvalidConfiguration);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(launch(nothing, 1, 0, 0, 1) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 1, 1025, 0, 1) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 1, dim3(32, 33), 0, 1) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 1, dim3(1, 1, 65), 0, 1) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, dim3(1, 65536), 1, 0, 1) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 1, 1024, 48 * kKiB, 1) == cudaSuccess);
  CHECK(launch(nothing, 1, 32, 48 * kKiB + 1, 1) == cudaErrorInvalidValue);
  const auto shared_limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK(cudaFuncSetAttribute(nothing, shared_limit, 228 * kKiB) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(nothing, shared_limit, 227 * kKiB) == cudaSuccess);
  CHECK(launch(nothing, 1, 32, 227 * kKiB, 1) == cudaSuccess);
  CHECK(launch(nothing_wide, 1, 32, 227 * kKiB, 1) == cudaErrorInvalidValue);
  CHECK(launch(nothing, 6, 32, 0, 4) == cudaErrorInvalidClusterSize);
  CHECK(launch(nothing, 16, 32, 0, 16) == cudaErrorInvalidClusterSize);
  CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
        cudaSuccess);
  CHECK(launch(nothing, 16, 32, 0, 16) == cudaSuccess);
  CHECK(launch(nothing, 17, 32, 0, 17) == cudaErrorInvalidClusterSize);
}

__global__ void two_barriers() {
  __syncthreads();
  __syncthreads();
}

void statistics() {
  emulator::reset_statistics();
  CHECK(launch(two_barriers, 5, 64, 0, 1) == cudaSuccess);
  CHECK(launch(nothing, 3, 1, 0, 1) == cudaSuccess);
  CHECK(launch(nothing, 0, 1, 0, 1) != cudaSuccess);  // never launched
  const emulator::Statistics counts = emulator::statistics();
  CHECK(counts.launches == 2 && counts.blocks == 8 && counts.barriers == 10);
}

void guarded_buffers() {
  auto* floats = static_cast<float*>(emulator::guarded_buffer(1021 * sizeof(float), 16));
  CHECK(reinterpret_cast<std::uintptr_t>(floats) % 16 == 0);
  CHECK(floats[0] != floats[0] && floats[1020] != floats[1020]);
  CHECK(emulator::release_guarded_buffer(floats));
  CHECK(!emulator::release_guarded_buffer(floats));
  auto* bytes = static_cast<unsigned char*>(emulator::guarded_buffer(4096 + 7));
  CHECK(reinterpret_cast<std::uintptr_t>(bytes + 7) % 4096 == 0);
  CHECK(emulator::release_guarded_buffer(bytes));
#ifndef __SANITIZE_ADDRESS__
  bytes = static_cast<unsigned char*>(emulator::guarded_buffer(5, 8));
  bytes[5] = 0;
  CHECK(!emulator::release_guarded_buffer(bytes));
#endif
}

// ---------------------------------------------------------------------------------------------

__global__ void many_rendezvous(float* out) {
  float value = 1;
  for (int i = 0; i < 10; ++i) {
    value += __shfl_xor_sync(kAllLanes, value, 1 << i % 5);
    shared<float>()[threadIdx.x] = value;
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

void speed() {
  std::vector<float> out(128);
  CHECK(launch(many_rendezvous, 128, 256, 1024, 1, out.data()) == cudaSuccess);  // warm stacks
  const auto start = std::chrono::steady_clock::now();
  CHECK(launch(many_rendezvous, 128, 256, 1024, 1, out.data()) == cudaSuccess);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("128 blocks of 256 threads, 20 rendezvous each: %.1f ms\n", 1e3 * taken.count());
  CHECK(out[127] == 1024.0f);
  CHECK(taken.count() < 2.0);  // 0.03 s on an idle machine; a slow switch would take tens
}

const std::map<std::string, void (*)()> kChecks = {
    {"indices", indices},
    {"shuffles", shuffles},
    {"shuffled_types", shuffled_types},
    {"votes", votes},
    {"block_votes", block_votes},
    {"atomics", atomics},
    {"shared_memory", shared_memory},
    {"clusters", clusters},
    {"asynchronous_copies", asynchronous_copies},
    {"launch_checks", launch_checks},
    {"statistics", statistics},
    {"guarded_buffers", guarded_buffers},
    {"speed", speed},
};

int main(int count, char** words) {
  const std::string name = count > 1 ? words[1] : "";
  if (kChecks.count(name) == 0) {
    for (const auto& [each, check] : kChecks) std::printf("%s\n", each.c_str());
    return 2;
  }
  if (count > 3 && std::string(words[2]) == "--seed") emulator::set_schedule(std::stoul(words[3]));
  try {
    kChecks.at(name)();
  } catch (const std::exception& problem) {
    std::printf("%s\n", problem.what());
    return 1;
  }
  return 0;
}

}  // namespace builtins

int main(int count, char** words) { return builtins::main(count, words); }
