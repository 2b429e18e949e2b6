// AddressSanitizer's interface, or nothing: the harness tells it about stack switches and red
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
#define SIMT_ASAN 1
#define SIMT_NO_ASAN __attribute__((no_sanitize_address))
#else
#define SIMT_ASAN 0
#define SIMT_NO_ASAN
#endif

namespace simt {

#if SIMT_ASAN
inline void asan_poison(const void* p, std::size_t n) { __asan_poison_memory_region(p, n); }
inline void asan_unpoison(const void* p, std::size_t n) { __asan_unpoison_memory_region(p, n); }
SIMT_NO_ASAN inline void asan_start_switch(void** save, const void* bottom, std::size_t size) {
  __sanitizer_start_switch_fiber(save, bottom, size);
}
SIMT_NO_ASAN inline void asan_finish_switch(void* fake, const void** bottom, std::size_t* size) {
  __sanitizer_finish_switch_fiber(fake, bottom, size);
}
#else
inline void asan_poison(const void*, std::size_t) {}
inline void asan_unpoison(const void*, std::size_t) {}
inline void asan_start_switch(void**, const void*, std::size_t) {}
inline void asan_finish_switch(void*, const void**, std::size_t*) {}
#endif

}  // namespace simt
