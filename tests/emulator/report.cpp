// The text of a fault: which kernel, block, thread and source line, and who waits for whom. Runs
// on the scheduler's stack after the fact, so it may allocate and even call addr2line.
#include <cxxabi.h>
#include <dlfcn.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <tuple>

#include "state.h"

namespace emulator {
namespace {

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

struct Source {
  std::string function, line;  // empty where there is no debug information
};

// By addr2line, which also knows functions that the dynamic linker does not.
Source source_of(const void* code) {
  Dl_info info{};
  if (code == nullptr || dladdr(code, &info) == 0) return {};
  const auto offset =
      static_cast<const unsigned char*>(code) - static_cast<const unsigned char*>(info.dli_fbase);
  char command[1024], words[2][2048] = {"", ""};
  std::snprintf(command, sizeof(command), "addr2line -f -C -e '%s' 0x%zx 2>/dev/null",
                info.dli_fname, static_cast<std::size_t>(offset));
  std::FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return {};
  for (char* word : words) {
    if (std::fgets(word, sizeof(words[0]), pipe) == nullptr) word[0] = '\0';
  }
  pclose(pipe);
  const auto cleaned = [](std::string text, const char* end) {
    text.erase(std::min(text.find_first_of(end), text.size()));
    return text.empty() || text[0] == '?' ? std::string() : text;
  };
  return {cleaned(words[0], "\n"), cleaned(words[1], " \n")};  // " (discriminator 3)"
}

// The kernel's own name, or at least its type.
std::string kernel_name(const Grid& grid) {
  Dl_info info{};
  if (dladdr(grid.kernel, &info) != 0 && info.dli_saddr == grid.kernel) {
    return demangled(info.dli_sname);
  }
  const std::string function = source_of(grid.kernel).function;
  return function.empty() ? demangled(grid.signature) : function;
}

std::string position(Site site) {
  if (site.file == nullptr) return "its first instructions";
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string where(const Grid& grid, const Cluster& cluster, const Block& block) {
  std::ostringstream out;
  out << "\n  kernel  " << kernel_name(grid) << "\n  block   " << triple(block.index);
  if (cluster.blocks.size() > 1) {
    out << ", rank " << block.rank << " of a cluster of " << cluster.blocks.size();
  }
  return out.str();
}

std::string who(const Thread& thread) {
  std::ostringstream out;
  out << "\n  thread  " << triple(thread.index) << ", warp " << thread.warp() << ", lane "
      << thread.lane();
  return out.str();
}

// ---------------------------------------------------------------------------------------------
// Hardware exceptions

// "file:line", or the address where that is unknown.
std::string source_line(const void* instruction) {
  const std::string line = source_of(instruction).line;
  if (!line.empty()) return line;
  std::ostringstream out;
  out << "instruction " << instruction;
  return out.str();
}

std::string describe_address(const Cluster& cluster, const Failure& failure) {
  const void* address = failure.address;
  if (failure.culprit->fibre.overflowed_at(address)) return "its stack overflowed";
  for (const Block& block : cluster.blocks) {
    if (!block.arena->covers(address)) continue;
    const std::string whose = "shared memory of block " + triple(block.index);
    if (block.live == 0) return whose + ", which has exited";
    if (!block.started) return whose + ", which has not started";
    return "past the " + whose;
  }
  return describe_guarded(address);
}

std::string describe_signal(const Cluster& cluster, const Failure& failure) {
  if (failure.signal == SIGFPE) return "integer division by zero or overflow";
  if (failure.signal == SIGVTALRM) return "computes without end: no rendezvous in sight";
  if (failure.signal == SIGILL) return "illegal instruction, as a trap leaves it";
  char address[32];
  std::snprintf(address, sizeof(address), "%p", failure.address);
  const std::string what = describe_address(cluster, failure);
  return std::string("invalid access to ") + address + (what.empty() ? "" : ": " + what);
}

// ---------------------------------------------------------------------------------------------
// Deadlocks

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::none:
      return "nothing";
    case Operation::shuffle:
      return "__shfl_sync";
    case Operation::shuffle_up:
      return "__shfl_up_sync";
    case Operation::shuffle_down:
      return "__shfl_down_sync";
    case Operation::shuffle_xor:
      return "__shfl_xor_sync";
    case Operation::ballot:
      return "__ballot_sync";
    case Operation::any:
      return "__any_sync";
    case Operation::all:
      return "__all_sync";
    case Operation::warp_barrier:
      return "__syncwarp";
    case Operation::block_barrier:
      return "__syncthreads";
    case Operation::block_barrier_count:
      return "__syncthreads_count";
    case Operation::block_barrier_or:
      return "__syncthreads_or";
    case Operation::block_barrier_and:
      return "__syncthreads_and";
    case Operation::cluster_barrier:
      return "the cluster barrier";
    case Operation::transaction_barrier:
      return "bytes sent by other blocks";
  }
  return "?";
}

bool at_warp_operation(const Thread& thread) {
  return thread.state == State::waiting && thread.operation >= Operation::shuffle &&
         thread.operation <= Operation::warp_barrier;
}

std::string call(const Thread& thread) {
  std::string text = name_of(thread.operation);
  if (at_warp_operation(thread)) {
    char mask[32];
    std::snprintf(mask, sizeof(mask), "(mask 0x%08x)", thread.mask);
    text += mask;
  }
  return text + " at " + position(thread.site);
}

bool same_wait(const Thread& a, const Thread& b) {
  return a.state == b.state && a.operation == b.operation && a.mask == b.mask &&
         a.site.line == b.site.line;
}

// Which named lane keeps `thread` waiting, and what that lane does instead.
std::string missing_lane(const Thread& thread) {
  const auto& threads = thread.block->threads;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((thread.mask >> lane & 1u) == 0) continue;
    const std::string name = " for lane " + std::to_string(lane);
    const std::size_t number = thread.warp() * 32 + lane;
    if (number >= threads.size()) return name + ", which the block does not have";
    if (same_wait(*threads[number], thread)) continue;
    if (threads[number]->state == State::exited) return name + ", which has exited";
    return name + ", which waits in " + call(*threads[number]);
  }
  return {};
}

// "0-31, 64": the threads of a block as ranges.
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t end = i;
    while (end + 1 < numbers.size() && numbers[end + 1] == numbers[end] + 1) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (end > i) text += "-" + std::to_string(numbers[end]);
    i = end + 1;
  }
  return text;
}

// One line for each group of threads of the block that do the same.
std::string block_groups(const Block& block) {
  std::map<std::string, std::vector<unsigned>> groups;
  for (const Thread* thread : block.threads) {
    std::string doing = "exited";
    if (thread->state == State::waiting) {
      doing = "wait in " + call(*thread);
      if (at_warp_operation(*thread)) doing += missing_lane(*thread);
    }
    groups[doing].push_back(thread->number);
  }
  std::string text;
  int lines = 0;
  for (const auto& [doing, numbers] : groups) {
    if (++lines > 8) return text + "\n    ...";
    text += "\n    threads " + ranges(numbers) + ": " + doing;
  }
  return text;
}

}  // namespace

std::string failure_report(const Grid& grid, const Cluster& cluster, const Failure& failure) {
  std::string text = "emulator: ";
  text += failure.signal != 0 ? describe_signal(cluster, failure) : failure.text;
  text += where(grid, cluster, *failure.culprit->block);
  if (!failure.whole_block) text += who(*failure.culprit);
  if (failure.signal != 0) {
    text += "\n  at      " + source_line(failure.instruction);
    text += "\n  after   " + position(failure.site);
  } else if (failure.site.file != nullptr) {
    text += "\n  at      " + position(failure.site);
  }
  return text;
}

std::string deadlock_report(const Grid& grid, const Cluster& cluster) {
  const Thread* stuck = nullptr;
  std::string groups;
  for (const Block& block : cluster.blocks) {
    if (block.live == 0) continue;
    for (const Thread* thread : block.threads) {
      if (stuck == nullptr && thread->state == State::waiting) stuck = thread;
    }
    groups += "\n  block " + triple(block.index) + ":" + block_groups(block);
  }
  return "emulator: deadlock: no thread can go on" + where(grid, cluster, *stuck->block) +
         who(*stuck) + "\n  at      " + call(*stuck) + groups;
}

}  // namespace emulator
