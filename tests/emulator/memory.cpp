// Shared-memory arenas and guarded buffers over mmap: overruns meet an inaccessible page, a red
// zone or a canary, never another object.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "emulator.h"
#include "sanitizer.h"

namespace emulator {

unsigned char poison_byte = 0xFF;

namespace {

constexpr std::size_t kArenaBytes = 232 << 10;  // CUDA's limit of 227 KiB, and a red zone
constexpr std::size_t kRedZoneBytes = 1024;
constexpr unsigned char kCanary = 0xFF;  // read as a float: NaN

std::size_t page_bytes() {
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

std::size_t round_up(std::size_t value, std::size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

unsigned char* map_pages(std::size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return static_cast<unsigned char*>(pages);
}

}  // namespace

Arena::Arena() : mapping_(map_pages(kArenaBytes + page_bytes())) {
  mprotect(mapping_ + kArenaBytes, page_bytes(), PROT_NONE);
}

Arena::~Arena() {
  unpoison();
  munmap(mapping_, kArenaBytes + page_bytes());
}

void Arena::unpoison() { asan_unpoison(mapping_, kArenaBytes); }

bool Arena::contains(const void* pointer) const {
  return pointer >= mapping_ && pointer < mapping_ + bytes_;
}

bool Arena::covers(const void* address) const {
  return address >= mapping_ && address < mapping_ + kArenaBytes + page_bytes();
}

void Arena::prepare(std::size_t bytes) {
  open();
  unpoison();
  bytes_ = bytes;
  std::memset(mapping_, poison_byte, bytes);
  std::memset(mapping_ + bytes, kCanary, kRedZoneBytes);
  asan_poison(mapping_ + bytes, kArenaBytes - bytes);
}

void Arena::close() {
  mprotect(mapping_, kArenaBytes, PROT_NONE);
  closed_ = true;
}

void Arena::open() {
  if (closed_) mprotect(mapping_, kArenaBytes, PROT_READ | PROT_WRITE);
  closed_ = false;
}

std::size_t Arena::overrun() const {
  if (EMULATOR_ASAN) return 0;  // already reported, and reading it would be an error of our own
  const unsigned char* red = mapping_ + bytes_;
  for (std::size_t i = 0; i < kRedZoneBytes; ++i) {
    if (red[i] != kCanary) return bytes_ + i;
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------
// Guarded buffers

namespace {

struct GuardedBuffer {
  unsigned char* mapping;
  std::size_t usable;  // bytes before the guard page
  std::size_t bytes;
};

std::mutex buffers_mutex;
std::map<unsigned char*, GuardedBuffer>& buffers() {
  static auto* map = new std::map<unsigned char*, GuardedBuffer>;  // outlives every static tensor
  return *map;
}

}  // namespace

void* guarded_buffer(std::size_t bytes, std::size_t alignment) {
  const std::size_t reserved = round_up(bytes, alignment);
  const std::size_t usable = round_up(std::max<std::size_t>(reserved, 1), page_bytes());
  unsigned char* mapping = map_pages(usable + page_bytes());
  mprotect(mapping + usable, page_bytes(), PROT_NONE);
  std::memset(mapping, poison_byte, usable);
  unsigned char* start = mapping + usable - reserved;
  std::memset(start + bytes, kCanary, reserved - bytes);
  asan_poison(start + bytes, reserved - bytes);
  const std::lock_guard lock(buffers_mutex);
  buffers()[start] = {mapping, usable, bytes};
  return start;
}

bool release_guarded_buffer(void* pointer) {
  const std::lock_guard lock(buffers_mutex);
  const auto found = buffers().find(static_cast<unsigned char*>(pointer));
  if (found == buffers().end()) return false;
  const GuardedBuffer buffer = found->second;
  const unsigned char* end = found->first + buffer.bytes;
  const auto slack = static_cast<std::size_t>(buffer.mapping + buffer.usable - end);
  asan_unpoison(end, slack);
  const bool intact = std::all_of(end, end + slack, [](unsigned char b) { return b == kCanary; });
  munmap(buffer.mapping, buffer.usable + page_bytes());
  buffers().erase(found);
  return intact;
}

std::string describe_guarded(const void* address) {
  const std::lock_guard lock(buffers_mutex);
  for (const auto& [start, buffer] : buffers()) {
    const unsigned char* end = buffer.mapping + buffer.usable + page_bytes();
    if (address < buffer.mapping || address >= end) continue;
    const auto offset = static_cast<const unsigned char*>(address) - (start + buffer.bytes);
    return std::to_string(offset) + " bytes past the end of a guarded buffer of " +
           std::to_string(buffer.bytes) + " bytes";
  }
  return {};
}

}  // namespace emulator
