// The scheduler: runs the clusters of a grid one after another, all threads of a cluster in turns,
// each until it waits at a rendezvous or exits. Lanes of a warp never run in lockstep, so a warp
// that relies on it without a barrier computes something else here.
#include "emulator.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>

#include "state.h"

namespace emulator {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

Thread* current = nullptr;  // the thread whose fibre runs; null in the scheduler
Cluster cluster;            // the one that runs
const Grid* grid = nullptr;
Failure failure;
double patience = 20;       // seconds
std::uint64_t resumes = 0;  // how often any fibre was resumed
Statistics counts{};
std::uint64_t launches_under_seed = 0;  // so that a seed gives the same schedules again

std::uint64_t seed_from_environment() {
  const char* text = std::getenv("EMULATOR_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 0);
}

std::uint64_t& seed() {
  static std::uint64_t value = seed_from_environment();
  return value;
}

// ---------------------------------------------------------------------------------------------
// Leaving a fibre

void wait_here() {
  current->state = State::waiting;
  current->fibre.suspend(false);
}

[[noreturn]] void give_up() {
  current->fibre.suspend(false);
  __builtin_unreachable();  // the scheduler throws; this fibre is never resumed
}

[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(Thread& culprit, Site site,
                                                             const char* format, ...) {
  failure.culprit = &culprit;
  failure.site = site;
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(failure.text, sizeof(failure.text), format, arguments);
  va_end(arguments);
  give_up();
}

void land_after_signal() { give_up(); }

// ---------------------------------------------------------------------------------------------
// Hardware exceptions in a kernel become failures of its thread, and so does an endless loop;
// other signals stay the process's own.

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
constexpr int kSignalCount = 5;

class SignalGuard {
 public:
  SignalGuard() {
    owner_ = pthread_self();
    stack_t alternate{};
    alternate.ss_sp = stack_.data();
    alternate.ss_size = stack_.size();
    sigaltstack(&alternate, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = &SignalGuard::handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &previous_[i]);
    resumes_at_last_tick_ = resumes;
    const double half = patience / 2;  // two ticks in the same turn of the same thread
    itimerval tick{};
    tick.it_value.tv_sec = static_cast<time_t>(half);
    tick.it_value.tv_usec = static_cast<suseconds_t>((half - std::floor(half)) * 1e6);
    tick.it_interval = tick.it_value;
    setitimer(ITIMER_VIRTUAL, &tick, &previous_timer_);
  }
  ~SignalGuard() {
    setitimer(ITIMER_VIRTUAL, &previous_timer_, nullptr);
    for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &previous_[i], nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  static void handle(int signal, siginfo_t* info, void* context) {
    const bool here = pthread_equal(owner_, pthread_self());
    if (signal == SIGVTALRM && !here) {  // the kernel picks any thread of the process
      pthread_kill(owner_, signal);
      return;
    }
    if (signal == SIGVTALRM && std::exchange(resumes_at_last_tick_, resumes) != resumes) return;
    if (current == nullptr || !here) return restore(signal);
    failure.culprit = current;
    failure.site = current->site;
    failure.signal = signal;
    failure.instruction = interrupted_instruction(context);
    failure.address = info->si_addr;
    if (!current->fibre.divert(context, &land_after_signal)) restore(signal);
  }
  // The instruction runs again and meets whoever handled the signal before.
  static void restore(int signal) {
    if (signal == SIGVTALRM) return;
    for (int i = 0; i < kSignalCount; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &previous_[i], nullptr);
    }
  }

  static inline pthread_t owner_;
  static inline struct sigaction previous_[kSignalCount];
  static inline std::uint64_t resumes_at_last_tick_;
  stack_t previous_stack_;
  itimerval previous_timer_;
  std::vector<unsigned char> stack_ = std::vector<unsigned char>(64 << 10);
};

// ---------------------------------------------------------------------------------------------
// Scheduling

// SplitMix64: equal on every machine, unlike the standard library's distributions.
class Random {
 public:
  explicit Random(std::uint64_t state) : state_(state) {}
  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t bound) { return next() % bound; }
  template <typename Iterator>
  void shuffle(Iterator begin, Iterator end) {
    for (auto n = end - begin; n > 1; --n) {
      std::swap(begin[n - 1], begin[below(static_cast<std::size_t>(n))]);
    }
  }

 private:
  std::uint64_t state_;
};

void thread_main() {
  grid->body(grid->arguments);
  Thread& self = *current;
  if (!self.copies.empty()) {
    fail(self, self.copies.front().site, "exits with an asynchronous copy it never waited for");
  }
  self.state = State::exited;
  self.fibre.suspend(true);
}

class Scheduler {
 public:
  void run_grid();

 private:
  void run_cluster(uint3 first_block);
  void prepare_block(Block& block, unsigned rank, uint3 first_block);
  void prepare_thread(Thread& thread, Block& block, unsigned number);
  void draw_lanes();
  void draw_warps();
  bool run_round(std::size_t first);
  void resume(Thread& thread);
  void retire_thread(Block& block);
  Thread& pooled_thread(std::size_t slot);
  Arena& pooled_arena(std::size_t slot);

  std::deque<Thread> threads_;
  std::deque<Arena> arenas_;
  std::vector<std::vector<Thread*>> warps_;  // of the cluster, in the order of this round
  std::size_t starved_ = 0;                  // this many of the first warps
  Random random_{0};
};

Thread& Scheduler::pooled_thread(std::size_t slot) {
  while (threads_.size() <= slot) threads_.emplace_back(static_cast<unsigned>(threads_.size()));
  return threads_[slot];
}

Arena& Scheduler::pooled_arena(std::size_t slot) {
  while (arenas_.size() <= slot) arenas_.emplace_back();
  return arenas_[slot];
}

void Scheduler::prepare_thread(Thread& thread, Block& block, unsigned number) {
  thread.block = &block;
  thread.number = number;
  thread.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                  number / (blockDim.x * blockDim.y)};
  thread.state = State::runnable;
  thread.operation = Operation::none;
  thread.site = {};
  thread.cluster_arrived = false;
  thread.copies.clear();
  thread.copy_group = 0;
  thread.fibre.begin(&thread_main);
}

void Scheduler::prepare_block(Block& block, unsigned rank, uint3 first_block) {
  const dim3 shape = grid->cluster;
  const unsigned size = blockDim.x * blockDim.y * blockDim.z;
  block.rank = rank;
  block.index = {first_block.x + rank % shape.x, first_block.y + rank / shape.x % shape.y,
                 first_block.z + rank / (shape.x * shape.y)};
  block.threads.resize(size);
  block.warps.assign((size + 31) / 32, {});
  block.live = size;
  block.started = false;
  block.first_arrived = nullptr;
  block.arrived = 0;
  block.predicates = 0;
  for (unsigned number = 0; number < size; ++number) {
    block.threads[number] = &pooled_thread(rank * size + number);
    prepare_thread(*block.threads[number], block, number);
  }
  block.arena = &pooled_arena(rank);
  block.arena->prepare(grid->shared_bytes);
  // A neighbour's shared memory exists from its first instruction to its last, no longer.
  if (shape.x * shape.y * shape.z > 1) block.arena->close();
}

void Scheduler::run_grid() {
  blockDim = grid->threads;
  gridDim = grid->blocks;
  random_ = Random(seed() + launches_under_seed++ * 0x5851f42d4c957f2du);
  ++counts.launches;
  const dim3 shape = grid->cluster;
  const std::uint64_t x = gridDim.x / shape.x, y = gridDim.y / shape.y, z = gridDim.z / shape.z;
  std::vector<std::uint64_t> order;
  if (seed() != 0) {
    for (std::uint64_t i = 0; i < x * y * z; ++i) order.push_back(i);
    random_.shuffle(order.begin(), order.end());
  }
  for (std::uint64_t i = 0; i < x * y * z; ++i) {
    const std::uint64_t n = order.empty() ? i : order[i];
    run_cluster({static_cast<unsigned>(n % x) * shape.x, static_cast<unsigned>(n / x % y) * shape.y,
                 static_cast<unsigned>(n / (x * y)) * shape.z});
  }
}

void Scheduler::run_cluster(uint3 first_block) {
  cluster.blocks.resize(grid->cluster.x * grid->cluster.y * grid->cluster.z);
  cluster.live = 0;
  cluster.arrived = 0;
  cluster.phase = 0;
  warps_.clear();
  starved_ = 0;
  for (unsigned rank = 0; rank < cluster.blocks.size(); ++rank) {
    Block& block = cluster.blocks[rank];
    prepare_block(block, rank, first_block);
    cluster.live += block.live;
    for (std::size_t i = 0; i < block.threads.size(); i += 32) {
      const std::size_t end = std::min(i + 32, block.threads.size());
      warps_.emplace_back(block.threads.begin() + static_cast<std::ptrdiff_t>(i),
                          block.threads.begin() + static_cast<std::ptrdiff_t>(end));
    }
  }
  counts.blocks += cluster.blocks.size();
  if (seed() != 0) draw_warps();
  while (cluster.live > 0) {
    // Some warps stay behind until the others can only wait for them: a barrier missing far from
    // the access that it protects shows under no fair order.
    if (seed() != 0) draw_lanes();
    if (seed() != 0 && run_round(starved_)) continue;
    if (seed() != 0) draw_warps();
    if (!run_round(0)) throw Fault(deadlock_report(*grid, cluster));
  }
}

void Scheduler::draw_lanes() {
  for (auto& warp : warps_) random_.shuffle(warp.begin(), warp.end());
}

void Scheduler::draw_warps() {
  random_.shuffle(warps_.begin(), warps_.end());
  starved_ = warps_.size() > 1 ? 1 + random_.below(warps_.size() - 1) : 0;
}

bool Scheduler::run_round(std::size_t first) {
  bool progress = false;
  for (std::size_t i = first; i < warps_.size(); ++i) {
    const auto& warp = warps_[i];
    for (Thread* thread : warp) {
      if (thread->state != State::runnable) continue;
      resume(*thread);
      progress = true;
    }
  }
  return progress;
}

void Scheduler::resume(Thread& thread) {
  Block& block = *thread.block;
  if (!block.started) block.arena->open();
  block.started = true;
  threadIdx = thread.index;
  blockIdx = block.index;
  current = &thread;
  ++resumes;
  thread.fibre.resume();
  current = nullptr;
  if (failure.culprit != nullptr) throw Fault(failure_report(*grid, cluster, failure));
  if (thread.state == State::exited) retire_thread(block);
}

void Scheduler::retire_thread(Block& block) {
  --cluster.live;
  if (--block.live > 0) return;
  if (const std::size_t offset = block.arena->overrun()) {
    failure.culprit = block.threads.front();
    failure.whole_block = true;
    std::snprintf(failure.text, sizeof(failure.text),
                  "the block wrote past the end of its shared memory: byte %zu of %zu", offset,
                  grid->shared_bytes);
    throw Fault(failure_report(*grid, cluster, failure));
  }
  if (cluster.blocks.size() > 1) block.arena->close();
}

}  // namespace

void run(const Grid& launched) {
  static std::mutex one_launch_at_a_time;
  static auto* scheduler = new Scheduler;  // never destroyed: tensors may outlive statics
  const std::lock_guard lock(one_launch_at_a_time);
  const SignalGuard signals;
  grid = &launched;
  failure = {};
  scheduler->run_grid();
}

// ---------------------------------------------------------------------------------------------
// Warp rendezvous

namespace {

Thread& lane_of(const Thread& thread, unsigned lane) {
  return *thread.block->threads[thread.warp() * 32 + lane];
}

bool same_call(const Thread& a, const Thread& b) {
  return a.operation == b.operation && a.mask == b.mask && a.site.line == b.site.line &&
         (a.site.file == b.site.file || std::strcmp(a.site.file, b.site.file) == 0);
}

template <typename Visit>
void for_each_lane(unsigned mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(static_cast<unsigned>(__builtin_ctz(mask)));
}

// Lanes that take part in the same call as `self`; a lane busy elsewhere does not.
bool everyone_is_here(const Thread& self, const Warp& warp) {
  if ((warp.waiting & self.mask) != self.mask) return false;
  bool agree = true;
  for_each_lane(self.mask, [&](unsigned lane) { agree &= same_call(self, lane_of(self, lane)); });
  return agree;
}

// PTX's shfl: the lane read, or the own lane where that leaves the segment of `width` lanes.
int shuffle_source(const Thread& thread) {
  const int lane = static_cast<int>(thread.lane());
  const int first = lane & ~(thread.width - 1), last = first + thread.width - 1;
  int source = lane;
  switch (thread.operation) {
    case Operation::shuffle:
      source = first + (thread.operand & (thread.width - 1));
      break;
    case Operation::shuffle_up:
      source = lane - thread.operand < first ? lane : lane - thread.operand;
      break;
    case Operation::shuffle_down:
      source = lane + thread.operand > last ? lane : lane + thread.operand;
      break;
    default:
      source = (lane ^ thread.operand) > last ? lane : lane ^ thread.operand;
      break;
  }
  return source;
}

std::uint64_t shuffled(Thread& thread) {
  const int source = shuffle_source(thread);
  if ((thread.mask >> (source & 31) & 1u) == 0) {
    fail(thread, thread.site, "shuffle reads from lane %d, which the mask 0x%08x does not name",
         source, thread.mask);
  }
  return lane_of(thread, static_cast<unsigned>(source)).value;
}

std::uint64_t vote(Operation operation, unsigned mask, unsigned ballot) {
  switch (operation) {
    case Operation::ballot:
      return ballot;
    case Operation::any:
      return ballot != 0;
    case Operation::all:
      return ballot == mask;
    default:
      return 0;
  }
}

void complete(Thread& self, Warp& warp) {
  unsigned ballot = 0;
  for_each_lane(self.mask, [&](unsigned lane) {
    if (lane_of(self, lane).value != 0) ballot |= 1u << lane;
  });
  const bool is_shuffle =
      self.operation >= Operation::shuffle && self.operation <= Operation::shuffle_xor;
  for_each_lane(self.mask, [&](unsigned lane) {
    Thread& other = lane_of(self, lane);
    other.result = is_shuffle ? shuffled(other) : vote(self.operation, self.mask, ballot);
    other.state = State::runnable;
  });
  warp.waiting &= ~self.mask;
}

}  // namespace

unsigned lane() { return current->lane(); }

std::uint64_t warp_rendezvous(Operation operation, unsigned mask, std::uint64_t value, int operand,
                              int width, Site site) {
  Thread& self = *current;
  if ((mask >> self.lane() & 1u) == 0) {
    fail(self, site, "the mask 0x%08x does not name the calling lane %u", mask, self.lane());
  }
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(self, site, "the shuffle width %d is not a power of two up to 32", width);
  }
  self.operation = operation;
  self.site = site;
  self.mask = mask;
  self.value = value;
  self.operand = operand;
  self.width = width;
  Warp& warp = self.block->warps[self.warp()];
  warp.waiting |= 1u << self.lane();
  if (everyone_is_here(self, warp)) {
    complete(self, warp);
  } else {
    wait_here();
  }
  return self.result;
}

// ---------------------------------------------------------------------------------------------
// Block and cluster barriers

namespace {

int barrier_result(Operation operation, int predicates, unsigned threads) {
  switch (operation) {
    case Operation::block_barrier_count:
      return predicates;
    case Operation::block_barrier_or:
      return predicates > 0;
    case Operation::block_barrier_and:
      return predicates == static_cast<int>(threads);
    default:
      return 0;
  }
}

}  // namespace

int block_rendezvous(Operation operation, int predicate, Site site) {
  Thread& self = *current;
  Block& block = *self.block;
  self.operation = operation;
  self.site = site;
  self.mask = 0;
  if (block.arrived == 0) block.first_arrived = &self;
  const Thread& first = *block.first_arrived;
  if (!same_call(self, first)) {
    fail(self, site, "divergent barrier: thread %u of the block is at another one, %s:%d",
         first.number, first.site.file, first.site.line);
  }
  block.predicates += predicate != 0;
  if (++block.arrived < block.threads.size()) {
    wait_here();
    return static_cast<int>(self.result);
  }
  const int result = barrier_result(operation, block.predicates, block.arrived);
  for (Thread* thread : block.threads) {
    thread->result = static_cast<std::uint64_t>(result);
    thread->state = State::runnable;
  }
  block.arrived = 0;
  block.predicates = 0;
  ++counts.barriers;
  return result;
}

unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return static_cast<unsigned>(cluster.blocks.size()); }

void cluster_arrive(const char* file, int line) {
  Thread& self = *current;
  if (self.cluster_arrived) fail(self, {file, line}, "arrives at a cluster barrier twice");
  self.cluster_arrived = true;
  self.cluster_phase = cluster.phase;
  self.site = {file, line};
  if (++cluster.arrived < cluster.blocks.size() * cluster.blocks.front().threads.size()) return;
  cluster.arrived = 0;
  ++cluster.phase;
  ++counts.barriers;
  for (Block& block : cluster.blocks) {
    for (Thread* thread : block.threads) {
      const bool waits = thread->state == State::waiting;
      if (waits && thread->operation == Operation::cluster_barrier) thread->state = State::runnable;
    }
  }
}

void cluster_wait(const char* file, int line) {
  Thread& self = *current;
  if (!self.cluster_arrived) fail(self, {file, line}, "waits at a cluster barrier before arriving");
  self.operation = Operation::cluster_barrier;
  self.site = {file, line};
  if (self.cluster_phase == cluster.phase) wait_here();
  self.cluster_arrived = false;
}

namespace {

struct TransactionBarrier {
  std::int32_t bytes;  // expected and not yet come; below 0 those that came unannounced
  std::uint16_t phase;
  bool announced;
  bool prepared;
};
static_assert(sizeof(TransactionBarrier) == sizeof(std::uint64_t));

TransactionBarrier load_barrier(const std::uint64_t* state, Site site) {
  TransactionBarrier barrier;
  std::memcpy(&barrier, state, sizeof(barrier));
  if (!barrier.prepared) fail(*current, site, "uses a barrier that nobody has initialised");
  return barrier;
}

void store_barrier(std::uint64_t* state, TransactionBarrier barrier) {
  if (barrier.announced && barrier.bytes == 0) {
    barrier.announced = false;
    ++barrier.phase;
    ++counts.barriers;
    for (Block& block : cluster.blocks) {
      for (Thread* thread : block.threads) {
        const bool waits = thread->state == State::waiting;
        if (waits && thread->operation == Operation::transaction_barrier)
          thread->state = State::runnable;
      }
    }
  }
  std::memcpy(state, &barrier, sizeof(barrier));
}

}  // namespace

void transaction_barrier_init(std::uint64_t* state, const char* file, int line) {
  current->site = {file, line};
  const TransactionBarrier barrier = {0, 0, false, true};
  std::memcpy(state, &barrier, sizeof(barrier));
}

void transaction_barrier_expect(std::uint64_t* state, unsigned bytes, const char* file, int line) {
  const Site site = current->site = {file, line};
  TransactionBarrier barrier = load_barrier(state, site);
  if (barrier.announced) fail(*current, site, "announces bytes twice in a phase");
  barrier.announced = true;
  barrier.bytes += static_cast<std::int32_t>(bytes);
  store_barrier(state, barrier);
}

void transaction_barrier_send(std::uint64_t* state, void* to, const void* value, std::size_t bytes,
                              const char* file, int line) {
  const Site site = current->site = {file, line};
  TransactionBarrier barrier = load_barrier(state, site);
  if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0) {
    fail(*current, site, "sends %zu bytes to an address that is no multiple of as many", bytes);
  }
  std::memcpy(to, value, bytes);
  barrier.bytes -= static_cast<std::int32_t>(bytes);
  store_barrier(state, barrier);
}

void transaction_barrier_wait(std::uint64_t* state, unsigned parity, const char* file, int line) {
  Thread& self = *current;
  self.site = {file, line};
  while (load_barrier(state, self.site).phase % 2 == parity) {
    self.operation = Operation::transaction_barrier;
    wait_here();
  }
}

// ---------------------------------------------------------------------------------------------
// Shared memory and asynchronous copies

void* dynamic_shared_memory() { return current->block->arena->start(); }

void* map_shared_bytes(const void* pointer, unsigned rank, Site site) {
  Thread& self = *current;
  self.site = site;
  if (rank >= cluster.blocks.size()) {
    fail(self, site, "block %u of a cluster of %zu does not exist", rank, cluster.blocks.size());
  }
  const Arena& own = *self.block->arena;
  if (!own.contains(pointer)) fail(self, site, "maps an address outside its own shared memory");
  return cluster.blocks[rank].arena->start() +
         (static_cast<const unsigned char*>(pointer) - own.start());
}

void async_copy(void* shared, const void* global, std::size_t bytes, const char* file, int line) {
  Thread& self = *current;
  const Site site{file, line};
  const auto* end = static_cast<unsigned char*>(shared) + bytes - 1;
  const Arena& own = *self.block->arena;
  const auto misaligned = [bytes](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0;
  };
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    fail(self, site, "an asynchronous copy of %zu bytes: not 4, 8 or 16", bytes);
  }
  if (misaligned(shared) || misaligned(global)) {
    fail(self, site, "a misaligned asynchronous copy of %zu bytes", bytes);
  }
  if (!own.contains(shared) || !own.contains(end)) {
    fail(self, site, "an asynchronous copy to outside the block's shared memory");
  }
  self.copies.push_back({shared, global, bytes, self.copy_group, site});
}

void async_commit() { ++current->copy_group; }

void async_wait(unsigned groups_left_pending, const char* file, int line) {
  Thread& self = *current;
  const auto landed = [&](const PendingCopy& copy) {
    if (copy.group + groups_left_pending >= self.copy_group) return false;
    self.site = copy.site;  // to blame if the source is not readable
    std::memcpy(copy.shared, copy.global, copy.bytes);
    return true;
  };
  self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), landed),
                    self.copies.end());
  self.site = {file, line};
}

void trap(Site site) { fail(*current, site, "__trap()"); }

// ---------------------------------------------------------------------------------------------
// For tests

void set_schedule(std::uint64_t value) {
  seed() = value;
  launches_under_seed = 0;
}
std::uint64_t schedule() { return seed(); }
void set_poison(unsigned char byte) { poison_byte = byte; }
void set_patience(double seconds) { patience = seconds; }
Statistics statistics() { return counts; }
void reset_statistics() { counts = {}; }

}  // namespace emulator

extern "C" {
void emulator_set_schedule(std::uint64_t seed) { emulator::set_schedule(seed); }
std::uint64_t emulator_schedule() { return emulator::schedule(); }
void emulator_set_poison(unsigned char byte) { emulator::set_poison(byte); }
void emulator_set_patience(double seconds) { emulator::set_patience(seconds); }
std::uint64_t emulator_launches() { return emulator::statistics().launches; }
std::uint64_t emulator_blocks() { return emulator::statistics().blocks; }
std::uint64_t emulator_barriers() { return emulator::statistics().barriers; }
void emulator_reset_statistics() { emulator::reset_statistics(); }
void* emulator_guarded_alloc(std::size_t bytes, std::size_t alignment) {
  return emulator::guarded_buffer(bytes, alignment);
}
bool emulator_guarded_free(void* pointer) { return emulator::release_guarded_buffer(pointer); }

// Called by code built with -fsanitize=alignment -fno-sanitize-recover=alignment: naming it here
// makes misaligned accesses faults with a source line, and needs no sanitizer runtime.
struct UbsanTypeMismatch {
  const char* file;
  std::uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
__attribute__((weak)) void __ubsan_handle_type_mismatch_v1_abort(UbsanTypeMismatch* what,
                                                                 void* address) {
  const unsigned alignment = 1u << what->log_alignment;
  if (emulator::current == nullptr) {
    std::fprintf(stderr, "%s:%u: misaligned access to %p\n", what->file, what->line, address);
    std::abort();
  }
  emulator::fail(*emulator::current, {what->file, static_cast<int>(what->line)},
                 "misaligned access: %p is not a multiple of %u bytes", address, alignment);
}
}
