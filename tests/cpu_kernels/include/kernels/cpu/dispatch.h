// Stands for csrc/kernels/cpu/dispatch.h: the one instruction set that the driver is compiled for.
#pragma once

#define IPO_EXT_CPU_ARCHS(X) X(driven)
#define IPO_EXT_CHOOSE(function) driven::function

namespace ipo_ext::cpu {

bool allows(const char* arch);

}  // namespace ipo_ext::cpu
