// What the CPU's SIMD loops run: the widest instruction set that the processor has and that the
// environment variable IPO_EXT_CPU_CAPABILITY allows, where it is set.
#pragma once

#include <string>

namespace ipo_ext::cpu {

// Its name, as in the variable. Throws std::invalid_argument where that holds no name.
std::string chosen_arch();

}  // namespace ipo_ext::cpu
