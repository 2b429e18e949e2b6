// Names the instruction sets that the SIMD loops (*_simd.cpp) are compiled for, and chooses one at
// run time: the widest that the processor has, and that IPO_EXT_CPU_CAPABILITY allows where it is
// set.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ipo_ext::cpu {

// The number n of x86-64-vn, where 1 is the baseline. The variable lets a test or a benchmark run
// what an older processor would.
inline int widest_arch_allowed() {
  const char* asked = std::getenv("IPO_EXT_CPU_CAPABILITY");
  if (asked == nullptr) return 4;
  const std::string name = asked;
  if (name == "x86-64-v4") return 4;
  if (name == "x86-64-v3") return 3;
  if (name == "baseline") return 1;
  throw std::invalid_argument(
      "IPO_EXT_CPU_CAPABILITY: expected baseline, x86-64-v3 or x86-64-v4, got " + name);
}

}  // namespace ipo_ext::cpu

#if defined(__x86_64__)
#define IPO_EXT_CPU_ARCHS(X) X(x86_64_v4) X(x86_64_v3) X(baseline)
#define IPO_EXT_HAS_ARCH(n) (widest_arch_allowed() >= n && __builtin_cpu_supports("x86-64-v" #n))
#define IPO_EXT_CHOOSE(function)              \
  IPO_EXT_HAS_ARCH(4)   ? x86_64_v4::function \
  : IPO_EXT_HAS_ARCH(3) ? x86_64_v3::function \
                        : baseline::function
#else
#define IPO_EXT_CPU_ARCHS(X) X(baseline)
#define IPO_EXT_CHOOSE(function) baseline::function
#endif

namespace ipo_ext::cpu {

// The name of the instruction set that is chosen.
inline std::string chosen_arch() {
#if defined(__x86_64__)
  if (IPO_EXT_HAS_ARCH(4)) return "x86-64-v4";
  if (IPO_EXT_HAS_ARCH(3)) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace ipo_ext::cpu
