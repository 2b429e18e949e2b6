// Planted faults: throw-away kernels, each wrong in one way, each with a correct twin, to prove
// that the emulator sees what it claims to see. Nothing here is part of the extension.
//
//   faults NAME [--correct] [--seed N | --seeds N]
//
// prints, for seed N, for each seed below N, or for EMULATOR_SEED, the result or the fault's
// report; exits 1 if any was a fault or a wrong result.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace faults {

constexpr unsigned kAllLanes = 0xffffffffu;

constexpr unsigned kThreads = 128;
constexpr unsigned kClusterBlocks = 4;
constexpr int kInputs = 4 * kThreads;

float* shared_floats() { return static_cast<float*>(emulator::dynamic_shared_memory()); }

// ---------------------------------------------------------------------------------------------
// Barriers that are missing: the result is wrong, or depends on the schedule.

template <bool kCorrect>
__global__ void missing_block_barrier(const float* in, float* out) {
  float* values = shared_floats();
  values[threadIdx.x] = in[threadIdx.x];
  if (kCorrect) __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The barrier that keeps a fast warp from overwriting what a slow one has yet to read.
template <bool kCorrect>
__global__ void missing_second_barrier(const float* in, float* out) {
  float* warp_sums = shared_floats();
  float total = 0;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = in[threadIdx.x] + round;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += warp_sums[i];
    if (kCorrect) __syncthreads();
  }
  out[threadIdx.x] = total;
}

template <bool kCorrect>
__global__ void missing_warp_barrier(const float* in, float* out) {
  float* values = shared_floats();
  values[threadIdx.x] = in[threadIdx.x];
  if (kCorrect) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

template <bool kCorrect>
__global__ void missing_cluster_barrier(const float* in, float* out) {
  float* partial = shared_floats();
  emulator::cluster_sync();
  if (threadIdx.x == 0) partial[0] = in[emulator::cluster_rank()];
  if (kCorrect) emulator::cluster_sync();
  const unsigned neighbour = (emulator::cluster_rank() + 1) % emulator::cluster_size();
  out[blockIdx.x * blockDim.x + threadIdx.x] = *emulator::map_shared(partial, neighbour);
  emulator::cluster_sync();
}

template <bool kCorrect>
__global__ void late_async_wait(const float* in, float* out) {
  float* values = shared_floats();
  emulator::async_copy(values + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
  emulator::async_commit();
  if (kCorrect) emulator::async_wait(0);
  out[threadIdx.x] = values[4 * threadIdx.x];
  emulator::async_wait(0);
}

// ---------------------------------------------------------------------------------------------
// Memory

template <bool kCorrect>
__global__ void load_past_the_end(const float* in, float* out) {
  float total = 0;
  for (int i = 0; i < kInputs / 4 + (kCorrect ? 0 : 1); ++i) {
    const float4 four = reinterpret_cast<const float4*>(in)[i];  // planted: load_past_the_end
    total += four.x + four.y + four.z + four.w;
  }
  out[threadIdx.x] = total;
}

template <bool kCorrect>
__global__ void tail_vector_load(const float* in, float* out) {
  constexpr int count = kInputs - 2;
  float total = 0;
  const int vectors = kCorrect ? count / 4 : (count + 3) / 4;
  for (int i = 0; i < vectors; ++i) {
    const float4 four = reinterpret_cast<const float4*>(in)[i];  // planted: tail_vector_load
    total += four.x + four.y + four.z + four.w;
  }
  for (int i = 4 * vectors; i < count; ++i) total += in[i];
  out[threadIdx.x] = total;
}

template <bool kCorrect>
__global__ void misaligned_vector_load(const float* in, float* out) {
  const float* start = kCorrect ? in : in + 1;
  const float2 two = *reinterpret_cast<const float2*>(start);  // planted: misaligned_vector_load
  out[threadIdx.x] = two.x + two.y;
}

template <bool kCorrect>
__global__ void shared_store_past_the_end(const float* in, float* out) {
  float* last = shared_floats() + kInputs - kThreads;
  last[threadIdx.x + (kCorrect ? 0 : 1)] = in[threadIdx.x];  // planted: shared_store_past_the_end
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kCorrect>
__global__ void unwritten_shared_read(const float* in, float* out) {
  float* values = shared_floats();
  if (kCorrect || threadIdx.x != 17) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float total = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) total += values[i];
  out[threadIdx.x] = total;
}

template <bool kCorrect>
__global__ void missing_async_wait(const float* in, float* out) {
  float* values = shared_floats() + 4 * threadIdx.x;
  emulator::async_copy(values, in + 4 * threadIdx.x, 16);  // planted: missing_async_wait
  emulator::async_commit();
  if (kCorrect) emulator::async_wait(0);
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kCorrect>
__global__ void unstarted_cluster_block(const float* in, float* out) {
  float* inbox = shared_floats();
  if (kCorrect) emulator::cluster_sync();
  const unsigned neighbour = (emulator::cluster_rank() + 1) % emulator::cluster_size();
  if (threadIdx.x == 0) {
    *emulator::map_shared(inbox, neighbour) = in[0];  // planted: unstarted_cluster_block
  }
  emulator::cluster_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = inbox[0];
}

template <bool kCorrect>
__global__ void exited_cluster_block(const float* in, float* out) {
  float* partial = shared_floats();
  if (threadIdx.x == 0) partial[0] = in[emulator::cluster_rank()];
  emulator::cluster_sync();
  const unsigned neighbour = (emulator::cluster_rank() + 1) % emulator::cluster_size();
  const float* theirs = emulator::map_shared(partial, neighbour);
  out[blockIdx.x * blockDim.x + threadIdx.x] = *theirs;  // planted: exited_cluster_block
  if (kCorrect) emulator::cluster_sync();
}

__attribute__((noinline)) int deep(volatile int* depth) {
  volatile int frame[256];
  frame[0] = *depth;
  if (frame[0] == 0) return 0;
  *depth = frame[0] - 1;
  return deep(depth) + frame[0];  // planted: stack_overflow
}

template <bool kCorrect>
__global__ void stack_overflow(const float* in, float* out) {
  volatile int depth = kCorrect ? 4 : 1 << 20;
  out[threadIdx.x] = in[threadIdx.x] + 0.0f * static_cast<float>(deep(&depth));
}

// ---------------------------------------------------------------------------------------------
// Rendezvous that cannot happen

template <bool kCorrect>
__global__ void divergent_barrier(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (!kCorrect && threadIdx.x >= 40) return;
  __syncthreads();  // planted: divergent_barrier
}

template <bool kCorrect>
__global__ void two_barriers(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (kCorrect || threadIdx.x % 2 == 0) {
    __syncthreads();  // planted: two_barriers
  } else {
    __syncthreads();
  }
}

template <bool kCorrect>
__global__ void barrier_against_shuffle(const float* in, float* out) {
  float value = in[threadIdx.x];
  const bool last_warp = threadIdx.x >= blockDim.x - 32;
  if (!kCorrect && last_warp && threadIdx.x % 32 == 5) {
    __syncthreads();  // planted: barrier_against_shuffle
  }
  value += 0 * __shfl_down_sync(kAllLanes, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

template <bool kCorrect>
__global__ void mask_without_the_caller(const float* in, float* out) {
  const unsigned mask = kCorrect ? kAllLanes : 0x0000ffffu;
  const float value = in[threadIdx.x];
  out[threadIdx.x] = __shfl_xor_sync(mask, value, 0);  // planted: mask_without_the_caller
}

template <bool kCorrect>
__global__ void two_masks(const float* in, float* out) {
  const unsigned mask = kCorrect || threadIdx.x % 32 < 16 ? kAllLanes : 0xffff0000u;
  const float value = in[threadIdx.x];
  out[threadIdx.x] = __shfl_xor_sync(mask, value, 0);  // planted: two_masks
}

template <bool kCorrect>
__global__ void unnamed_source(const float* in, float* out) {
  const float value = out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x >= 16) return;
  const int other = kCorrect ? 8 : 16;
  out[threadIdx.x] += 0 * __shfl_xor_sync(0x0000ffffu, value, other);  // planted: unnamed_source
}

template <bool kCorrect>
__global__ void exited_lane(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (!kCorrect && threadIdx.x == 63) return;
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, in[threadIdx.x], 0);  // planted: exited_lane
}

template <bool kCorrect>
__global__ void endless_loop(const float* in, float* out) {
  volatile float* flag = shared_floats();
  flag[threadIdx.x] = kCorrect || threadIdx.x != 77 ? in[threadIdx.x] : 0;
  while (flag[threadIdx.x] == 0) {  // planted: endless_loop
  }
  out[threadIdx.x] = flag[threadIdx.x];
}

// ---------------------------------------------------------------------------------------------
// Order

template <bool kCorrect>
__global__ void float_atomic(const float* in, float* out) {
  if (!kCorrect) {
    atomicAdd(out, in[threadIdx.x]);
  } else if (threadIdx.x == 0) {
    for (unsigned i = 0; i < blockDim.x; ++i) *out += in[i];
  }
}

// ---------------------------------------------------------------------------------------------
// What the correct twins compute, from small integers whose sums are exact in any order

float input(unsigned i) { return static_cast<float>(i % 61 + 1); }

float sum_of(unsigned count) {
  float total = 0;
  for (unsigned i = 0; i < count; ++i) total += input(i);
  return total;
}

float same(unsigned thread, unsigned) { return input(thread); }
float reversed(unsigned thread, unsigned) { return input(kThreads - 1 - thread); }
float swapped(unsigned thread, unsigned) { return input(thread ^ 1); }
float every_fourth(unsigned thread, unsigned) { return input(4 * thread); }
float neighbours(unsigned, unsigned block) { return input((block + 1) % kClusterBlocks); }
float first(unsigned, unsigned) { return input(0); }
float first_two(unsigned, unsigned) { return sum_of(2); }
float block_sum(unsigned, unsigned) { return sum_of(kThreads); }
float full_sum(unsigned, unsigned) { return sum_of(kInputs); }
float tail_sum(unsigned, unsigned) { return sum_of(kInputs - 2); }
float warp_rounds(unsigned, unsigned) {
  float total = 0;
  for (unsigned round = 0; round < 4; ++round) {
    for (unsigned i = 0; i < kThreads; i += 32) total += input(i) + static_cast<float>(round);
  }
  return total;
}

// ---------------------------------------------------------------------------------------------
// Running one of them

using Kernel = void (*)(const float*, float*);
using Expected = float (*)(unsigned thread, unsigned block);

struct Case {
  Kernel faulty, correct;
  Expected expected;  // null: any result, but always the same
  unsigned blocks = 1;
  int inputs = kInputs;
};

#define BOTH(kernel) kernel<false>, kernel<true>
const std::map<std::string, Case> kCases = {
    {"missing_block_barrier", {BOTH(missing_block_barrier), reversed}},
    {"missing_second_barrier", {BOTH(missing_second_barrier), warp_rounds}},
    {"missing_warp_barrier", {BOTH(missing_warp_barrier), swapped}},
    {"missing_cluster_barrier", {BOTH(missing_cluster_barrier), neighbours, kClusterBlocks}},
    {"late_async_wait", {BOTH(late_async_wait), every_fourth}},
    {"missing_async_wait", {BOTH(missing_async_wait), same}},
    {"load_past_the_end", {BOTH(load_past_the_end), full_sum}},
    {"tail_vector_load", {BOTH(tail_vector_load), tail_sum, 1, kInputs - 2}},
    {"misaligned_vector_load", {BOTH(misaligned_vector_load), first_two}},
    {"shared_store_past_the_end", {BOTH(shared_store_past_the_end), same}},
    {"unwritten_shared_read", {BOTH(unwritten_shared_read), block_sum}},
    {"unstarted_cluster_block", {BOTH(unstarted_cluster_block), first, kClusterBlocks}},
    {"exited_cluster_block", {BOTH(exited_cluster_block), neighbours, kClusterBlocks}},
    {"stack_overflow", {BOTH(stack_overflow), same}},
    {"divergent_barrier", {BOTH(divergent_barrier), same}},
    {"two_barriers", {BOTH(two_barriers), same}},
    {"barrier_against_shuffle", {BOTH(barrier_against_shuffle), same}},
    {"mask_without_the_caller", {BOTH(mask_without_the_caller), same}},
    {"two_masks", {BOTH(two_masks), same}},
    {"unnamed_source", {BOTH(unnamed_source), same}},
    {"exited_lane", {BOTH(exited_lane), same}},
    {"endless_loop", {BOTH(endless_loop), same}},
    {"float_atomic", {BOTH(float_atomic), nullptr}},
};
#undef BOTH

void launch(const Case& which, bool correct, const float* in, float* out) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = which.blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = which.blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kInputs * sizeof(float);
  config.attrs = &cluster;
  config.numAttrs = 1;
  const cudaError_t status =
      cudaLaunchKernelEx(&config, correct ? which.correct : which.faulty, in, out);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Prints the first wrong element, or a checksum of all.
bool check(const Case& which, const std::vector<float>& out) {
  if (which.expected == nullptr) return std::printf("result %a\n", out[0]) > 0;
  double checksum = 0;
  for (unsigned i = 0; i < out.size(); ++i) {
    const float expected = which.expected(i % kThreads, i / kThreads);
    if (out[i] != expected) {
      std::printf("wrong result %g instead of %g at %u\n", out[i], expected, i);
      return false;
    }
    checksum += (i + 1) * static_cast<double>(out[i]);
  }
  return std::printf("result %.17g\n", checksum) > 0;
}

bool run(const Case& which, bool correct) {
  const std::size_t bytes = static_cast<std::size_t>(which.inputs) * sizeof(float);
  auto* in = static_cast<float*>(emulator::guarded_buffer(bytes, alignof(float4)));
  for (int i = 0; i < which.inputs; ++i) {
    in[i] = input(static_cast<unsigned>(i));
    if (which.expected == nullptr) in[i] = 1.0f / in[i];  // sums depend on their order
  }
  std::vector<float> out(which.blocks * kThreads, 0.0f);
  bool passed = false;
  std::printf("seed %lu: ", static_cast<unsigned long>(emulator::schedule()));
  try {
    launch(which, correct, in, out.data());
    passed = check(which, out);
  } catch (const emulator::Fault& fault) {
    std::printf("%s\n", fault.what());
  }
  return emulator::release_guarded_buffer(in) && passed;
}

int main(int count, char** words) {
  const std::vector<std::string> arguments(words + 1, words + count);
  bool correct = false;
  std::vector<std::uint64_t> seeds = {emulator::schedule()};
  std::string name;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--correct") {
      correct = true;
    } else if (arguments[i] == "--seed") {
      seeds = {std::stoul(arguments.at(++i))};
    } else if (arguments[i] == "--seeds") {
      seeds.resize(std::stoul(arguments.at(++i)));
      std::iota(seeds.begin(), seeds.end(), 0);
    } else {
      name = arguments[i];
    }
  }
  if (kCases.count(name) == 0) {
    for (const auto& [each, which] : kCases) std::printf("%s\n", each.c_str());
    return 2;
  }
  emulator::set_patience(0.2);
  bool passed = true;
  for (const std::uint64_t seed : seeds) {
    emulator::set_schedule(seed);
    passed &= run(kCases.at(name), correct);
  }
  return passed ? 0 : 1;
}

}  // namespace faults

int main(int count, char** words) { return faults::main(count, words); }
