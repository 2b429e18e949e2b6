// Memory that notices misuse: the blocks' shared memory, and buffers that end at an inaccessible
// page. Both avoid silent overruns; neither needs a sanitizer.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {

extern unsigned char poison_byte;

// The shared memory of one block at a time. [start, start + bytes) is the block's; the red zone
// behind it is poisoned for AddressSanitizer and a canary pattern otherwise.
class Arena {
 public:
  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  unsigned char* start() const { return mapping_; }
  bool contains(const void* pointer) const;
  // True if the address lies anywhere in the mapping, red zone and guard page included.
  bool covers(const void* address) const;

  void prepare(std::size_t bytes);  // filled with the poison byte
  // Any access to closed memory is a fault: the block has not started yet, or has exited.
  void close();
  void open();
  // The first byte behind the block's memory that it overwrote, as an offset; 0 if none.
  std::size_t overrun() const;

 private:
  void unpoison();

  unsigned char* mapping_;
  std::size_t bytes_ = 0;
  bool closed_ = false;
};

// What a test needs to know of an address that was hit: "8 bytes past the end of a guarded buffer
// of 1024 bytes", or empty when no guarded buffer is near.
std::string describe_guarded(const void* address);

}  // namespace emulator
