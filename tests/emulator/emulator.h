// The emulator: runs CUDA kernels, compiled by the host compiler, on one OS thread with one
// fibre for every CUDA thread. It avoids hangs: whatever cannot go on is reported as a Fault.
//
// Three readers: tests (schedule, statistics, guarded buffers), the kernels' platform helpers
// (shared memory, clusters, asynchronous copies) and the shadow cuda_runtime.h (everything else).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "include/vector_types.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------
// For tests

// A kernel broke a rule. The text names the kernel, block, thread and source line. Thrown by the
// launch after all its threads were abandoned; the emulator can be used again at once.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// 0 runs threads and blocks in their natural order. Any other seed permutes threads, warps and
// blocks, redrawn at every scheduling round. The first launch takes it from EMULATOR_SEED.
void set_schedule(std::uint64_t seed);
std::uint64_t schedule();

// The byte that shared memory is filled with before each block; 0xFF makes every float a NaN.
void set_poison(unsigned char byte);

// A thread that computes for so long (CPU seconds, 20 at first) without reaching a rendezvous or
// its end is taken to loop for ever.
void set_patience(double seconds);

struct Statistics {
  std::uint64_t launches, blocks, barriers;
};
Statistics statistics();
void reset_statistics();

// Memory that ends at an inaccessible page: an access past it is a Fault in a kernel. Filled with
// the poison byte. With an alignment, the start is a multiple of it, and the few bytes left before
// the page read as NaN, must not be written, and are red for AddressSanitizer.
// An aligned vector never straddles a page: only an aligned buffer shows a tail vector that is
// partly out of bounds, only an unaligned one shows a single element too many at once.
void* guarded_buffer(std::size_t bytes, std::size_t alignment = 1);
// False if the pointer is no such buffer, or bytes past its end were overwritten.
bool release_guarded_buffer(void* pointer);

// ---------------------------------------------------------------------------------------------
// For the kernels' helpers

struct Site {
  const char* file = nullptr;
  int line = 0;
};

#define EMULATOR_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// The calling block's dynamic shared memory: 1024-byte aligned, a red zone directly behind it.
void* dynamic_shared_memory();

unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive(EMULATOR_SITE_PARAMETERS);
void cluster_wait(EMULATOR_SITE_PARAMETERS);
inline void cluster_sync(EMULATOR_SITE_PARAMETERS) {
  cluster_arrive(file, line);
  cluster_wait(file, line);
}

// The same place in the shared memory of block `rank` of this cluster.
void* map_shared_bytes(const void* pointer, unsigned rank, Site site);
template <typename T>
T* map_shared(T* pointer, unsigned rank, EMULATOR_SITE_PARAMETERS) {
  return static_cast<T*>(map_shared_bytes(pointer, rank, {file, line}));
}

// An mbarrier of one arrival, and st.async, which counts its bytes there: a phase is complete once
// it was told how many to expect and so many have come.
void transaction_barrier_init(std::uint64_t* state, EMULATOR_SITE_PARAMETERS);
void transaction_barrier_expect(std::uint64_t* state, unsigned bytes, EMULATOR_SITE_PARAMETERS);
void transaction_barrier_send(std::uint64_t* state, void* to, const void* value, std::size_t bytes,
                              EMULATOR_SITE_PARAMETERS);
void transaction_barrier_wait(std::uint64_t* state, unsigned parity, EMULATOR_SITE_PARAMETERS);

// cp.async: 4, 8 or 16 aligned bytes from global to the block's own shared memory. They land when
// this thread waits; until then the destination keeps what it held.
void async_copy(void* shared, const void* global, std::size_t bytes, EMULATOR_SITE_PARAMETERS);
void async_commit();
void async_wait(unsigned groups_left_pending, EMULATOR_SITE_PARAMETERS);

// ---------------------------------------------------------------------------------------------
// For the shadow cuda_runtime.h

enum class Operation : unsigned char {
  none,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  any,
  all,
  warp_barrier,
  block_barrier,
  block_barrier_count,
  block_barrier_or,
  block_barrier_and,
  cluster_barrier,
  transaction_barrier,
};

// A rendezvous of the lanes named by `mask`; `operand` is the source lane, delta or lane mask.
std::uint64_t warp_rendezvous(Operation operation, unsigned mask, std::uint64_t value, int operand,
                              int width, Site site);
// A rendezvous of the block; returns what the barrier computes over the predicates.
int block_rendezvous(Operation operation, int predicate, Site site);
unsigned lane();
[[noreturn]] void trap(Site site);

struct Grid {
  dim3 blocks, threads, cluster;
  std::size_t shared_bytes;
  const void* kernel;
  const char* signature;      // mangled, for kernels whose symbol is not exported
  void (*body)(const void*);  // calls the kernel once, for the current thread
  const void* arguments;
};
// Runs every thread of the grid to its end. Throws Fault.
void run(const Grid& grid);

}  // namespace emulator

// The same for ctypes.
extern "C" {
void emulator_set_schedule(std::uint64_t seed);
std::uint64_t emulator_schedule();
void emulator_set_poison(unsigned char byte);
void emulator_set_patience(double seconds);
std::uint64_t emulator_launches();
std::uint64_t emulator_blocks();
std::uint64_t emulator_barriers();
void emulator_reset_statistics();
void* emulator_guarded_alloc(std::size_t bytes, std::size_t alignment);
bool emulator_guarded_free(void* pointer);
// The simulated device's answer to cudaDeviceGetAttribute; -1 restores the default.
void emulator_set_device_attribute(int attribute, int value);
}
