// What the scheduler knows of a running cluster: threads, warps, blocks and what each waits for.
// Shared by emulator.cpp, which changes it, and report.cpp, which turns it into a fault's text.
#pragma once

#include <string>
#include <vector>

#include "emulator.h"
#include "fibre.h"
#include "memory.h"

namespace emulator {

struct Block;

struct PendingCopy {
  void* shared;
  const void* global;
  std::size_t bytes;
  unsigned group;
  Site site;
};

enum class State : unsigned char { runnable, waiting, exited };

struct Thread {
  explicit Thread(unsigned slot) : fibre(slot) {}

  Fibre fibre;
  Block* block = nullptr;
  unsigned number = 0;  // within the block
  uint3 index{};
  State state = State::exited;

  // The rendezvous it waits at, or passed last.
  Operation operation = Operation::none;
  Site site;
  unsigned mask = 0;
  int operand = 0, width = 32;
  std::uint64_t value = 0, result = 0;

  bool cluster_arrived = false;  // and has not waited yet
  std::uint64_t cluster_phase = 0;
  std::vector<PendingCopy> copies;
  unsigned copy_group = 0;

  unsigned lane() const { return number % 32; }
  unsigned warp() const { return number / 32; }
};

struct Warp {
  unsigned waiting = 0;  // lanes at a warp rendezvous
};

struct Block {
  uint3 index{};
  unsigned rank = 0;  // within the cluster
  Arena* arena = nullptr;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  unsigned live = 0;
  bool started = false;

  // The block barrier that threads are gathering at.
  Thread* first_arrived = nullptr;
  unsigned arrived = 0;
  int predicates = 0;  // how many of them hold
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned live = 0;
  unsigned arrived = 0;
  std::uint64_t phase = 0;  // completed cluster barriers
};

// What stopped the launch, recorded on the fibre without allocating: it will not be unwound.
struct Failure {
  Thread* culprit = nullptr;  // null: nothing failed
  bool whole_block = false;   // any thread of the culprit's block may have done it
  Site site;
  char text[512] = "";
  int signal = 0;  // or a hardware exception, at this instruction, for this address
  void* instruction = nullptr;
  void* address = nullptr;
};

std::string failure_report(const Grid& grid, const Cluster& cluster, const Failure& failure);
std::string deadlock_report(const Grid& grid, const Cluster& cluster);

}  // namespace emulator
