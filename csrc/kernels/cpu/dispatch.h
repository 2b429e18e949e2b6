// Names the instruction sets that the SIMD loops (*_simd.cpp) are compiled for, and chooses one at
// run time.
#pragma once

#if defined(__x86_64__)
#define IPO_EXT_CPU_ARCHS(X) X(x86_64_v4) X(x86_64_v3) X(baseline)
#define IPO_EXT_CHOOSE(function)                                                     \
  allows("x86_64_v4") && __builtin_cpu_supports("x86-64-v4")   ? x86_64_v4::function \
  : allows("x86_64_v3") && __builtin_cpu_supports("x86-64-v3") ? x86_64_v3::function \
                                                               : baseline::function
#else
#define IPO_EXT_CPU_ARCHS(X) X(baseline)
#define IPO_EXT_CHOOSE(function) baseline::function
#endif

namespace ipo_ext::cpu {

// Whether IPO_EXT_CPU_CAPABILITY names this instruction set or a wider one, or is not set.
bool allows(const char* arch);

}  // namespace ipo_ext::cpu
