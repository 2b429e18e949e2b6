// Fibres by hand-written context switch (x86-64, aarch64) or ucontext (elsewhere). Only what a
// function call preserves is saved: a switch avoids ucontext's system call.
#include "fibre.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "sanitizer.h"

#if EMULATOR_ASSEMBLY_SWITCH
// Saves the callee-saved registers on this stack, its pointer at `*save`, and goes on at `load`.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
  .text
  .hidden emulator_switch
  .globl emulator_switch
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, .-emulator_switch
)");
#else
asm(R"(
  .text
  .hidden emulator_switch
  .globl emulator_switch
  .type emulator_switch, %function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size emulator_switch, .-emulator_switch
)");
#endif
#endif  // EMULATOR_ASSEMBLY_SWITCH

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = EMULATOR_ASAN ? 256 << 10 : 64 << 10;

// The fibre that enter() is to start: the only way to hand it over without an argument register.
Fibre* entering = nullptr;

std::size_t page_bytes() {
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Fibre::Fibre(unsigned colour) {
  const std::size_t bytes = kStackBytes + page_bytes();
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(mapping);
  mprotect(mapping_, page_bytes(), PROT_NONE);
  // Equal page offsets would put every stack's top into the same few cache sets.
  top_ = mapping_ + bytes - (colour % 32) * 128;
}

Fibre::~Fibre() {
  asan_unpoison(mapping_ + page_bytes(), kStackBytes);
  munmap(mapping_, kStackBytes + page_bytes());
}

void Fibre::begin(Entry entry) {
  entry_ = entry;
  fake_stack_ = nullptr;
  if (abandoned_) asan_unpoison(mapping_ + page_bytes(), kStackBytes);
  abandoned_ = true;  // until it says otherwise by its last suspend()
#if EMULATOR_ASSEMBLY_SWITCH && defined(__x86_64__)
  // Six registers, enter() as the return address, and a null one above it to end stack walks.
  void** frame = reinterpret_cast<void**>(top_) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&Fibre::enter);
  stack_pointer_ = frame;
#elif EMULATOR_ASSEMBLY_SWITCH
  void** frame = reinterpret_cast<void**>(top_) - 20;
  std::memset(frame, 0, 20 * sizeof(void*));
  frame[11] = reinterpret_cast<void*>(&Fibre::enter);  // x30
  stack_pointer_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = mapping_ + page_bytes();
  context_.uc_stack.ss_size = static_cast<std::size_t>(top_ - mapping_) - page_bytes();
  context_.uc_link = nullptr;
  makecontext(&context_, &Fibre::enter, 0);
#endif
}

EMULATOR_NO_ASAN void Fibre::enter() {
  Fibre* self = entering;
  asan_finish_switch(nullptr, &self->caller_bottom_, &self->caller_size_);
  self->entry_();
  __builtin_trap();  // an entry ends by suspend(last), never by returning
}

void Fibre::resume() {
  entering = this;
  asan_start_switch(&caller_fake_stack_, mapping_ + page_bytes(), kStackBytes);
#if EMULATOR_ASSEMBLY_SWITCH
  emulator_switch(&caller_stack_pointer_, stack_pointer_);
#else
  swapcontext(&caller_context_, &context_);
#endif
  asan_finish_switch(caller_fake_stack_, nullptr, nullptr);
}

EMULATOR_NO_ASAN void Fibre::suspend(bool last) {
  if (last) abandoned_ = false;
  asan_start_switch(last ? nullptr : &fake_stack_, caller_bottom_, caller_size_);
#if EMULATOR_ASSEMBLY_SWITCH
  emulator_switch(&stack_pointer_, caller_stack_pointer_);
#else
  swapcontext(&context_, &caller_context_);
#endif
  asan_finish_switch(fake_stack_, nullptr, nullptr);
}

bool Fibre::overflowed_at(const void* address) const {
  return address >= mapping_ && address < mapping_ + page_bytes();
}

#if EMULATOR_ASSEMBLY_SWITCH && defined(__linux__)

bool Fibre::divert(void* signal_context, Entry landing) {
  asan_unpoison(mapping_ + page_bytes(), kStackBytes);
  mcontext_t& machine = static_cast<ucontext_t*>(signal_context)->uc_mcontext;
#if defined(__x86_64__)
  // As after a call: the return address lies on a 16-byte boundary, minus its own 8 bytes.
  machine.gregs[REG_RSP] = reinterpret_cast<greg_t>(top_ - 8);
  machine.gregs[REG_RBP] = 0;
  machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(landing);
#else
  machine.sp = reinterpret_cast<std::uintptr_t>(top_);
  machine.regs[29] = 0;
  machine.regs[30] = 0;
  machine.pc = reinterpret_cast<std::uintptr_t>(landing);
#endif
  return true;
}

void* interrupted_instruction(void* signal_context) {
  const mcontext_t& machine = static_cast<ucontext_t*>(signal_context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<void*>(machine.gregs[REG_RIP]);
#else
  return reinterpret_cast<void*>(machine.pc);
#endif
}

#elif !EMULATOR_ASSEMBLY_SWITCH

// setcontext() may leave a handler; it cannot be told to go on elsewhere, so this is the last stop.
bool Fibre::divert(void*, Entry) { return setcontext(&caller_context_) == 0; }
void* interrupted_instruction(void*) { return nullptr; }

#else
#error "say how a signal handler finds and changes the interrupted registers here"
#endif

}  // namespace emulator
