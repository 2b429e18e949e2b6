// AddressSanitizer's interface, or nothing: the emulator tells it about stack switches and red
// zones, and avoids #ifdefs everywhere else.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#define EMULATOR_NO_ASAN __attribute__((no_sanitize_address))
#else
#define EMULATOR_ASAN 0
#define EMULATOR_NO_ASAN
#endif

namespace emulator {

#if EMULATOR_ASAN
inline void asan_poison(const void* p, std::size_t n) { __asan_poison_memory_region(p, n); }
inline void asan_unpoison(const void* p, std::size_t n) { __asan_unpoison_memory_region(p, n); }
EMULATOR_NO_ASAN inline void asan_start_switch(void** save, const void* bottom, std::size_t size) {
  __sanitizer_start_switch_fiber(save, bottom, size);
}
EMULATOR_NO_ASAN inline void asan_finish_switch(void* fake, const void** bottom,
                                                std::size_t* size) {
  __sanitizer_finish_switch_fiber(fake, bottom, size);
}
#else
inline void asan_poison(const void*, std::size_t) {}
inline void asan_unpoison(const void*, std::size_t) {}
inline void asan_start_switch(void**, const void*, std::size_t) {}
inline void asan_finish_switch(void*, const void**, std::size_t*) {}
#endif

}  // namespace emulator
