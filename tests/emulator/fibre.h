// A fibre: a stack and a place to go on. Switching costs a few nanoseconds and no system call;
// stacks outlive the threads that run on them, so a launch allocates nothing once warm.
#pragma once

#include <cstddef>

#if !defined(EMULATOR_FORCE_UCONTEXT) && defined(__ELF__) && \
    (defined(__x86_64__) || defined(__aarch64__))
#define EMULATOR_ASSEMBLY_SWITCH 1
#else
#define EMULATOR_ASSEMBLY_SWITCH 0
#include <ucontext.h>
#endif

namespace emulator {

class Fibre {
 public:
  using Entry = void (*)();

  explicit Fibre(unsigned colour);  // `colour` spreads stack tops over the cache's sets
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The next resume() calls `entry` on an empty stack; whatever ran there before is forgotten.
  void begin(Entry entry);
  // For the scheduler: runs the fibre until it suspends itself.
  void resume();
  // For the fibre itself: back to the scheduler; with `last`, never to return.
  void suspend(bool last);
  // From a signal handler that interrupted this fibre: abandons what it was doing. `landing` runs
  // on the emptied stack once the handler returns, or the scheduler goes on at once. False if
  // neither can be done.
  bool divert(void* signal_context, Entry landing);
  // True if the address lies in the guard page below the stack.
  bool overflowed_at(const void* address) const;

 private:
  static void enter();

  unsigned char* mapping_;
  unsigned char* top_;
  Entry entry_ = nullptr;
#if EMULATOR_ASSEMBLY_SWITCH
  void* stack_pointer_ = nullptr;
  void* caller_stack_pointer_ = nullptr;
#else
  ucontext_t context_, caller_context_;
#endif
  bool abandoned_ = false;  // the stack may still hold frames, and their red zones
  // AddressSanitizer's view of both stacks.
  void* fake_stack_ = nullptr;
  void* caller_fake_stack_ = nullptr;
  const void* caller_bottom_ = nullptr;
  std::size_t caller_size_ = 0;
};

// The address of the instruction that a signal interrupted; null where unknown.
void* interrupted_instruction(void* signal_context);

}  // namespace emulator
