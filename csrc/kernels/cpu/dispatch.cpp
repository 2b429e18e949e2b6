// Reads which instruction set the environment allows: a test or a benchmark runs what an older
// processor would.
#include "kernels/cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu_arch.h"

namespace ipo_ext::cpu {

#define IPO_EXT_NAME(arch) #arch,
#define IPO_EXT_DEFINE_NAME(arch)      \
  namespace arch {                     \
  const char* const kArchName = #arch; \
  }

IPO_EXT_CPU_ARCHS(IPO_EXT_DEFINE_NAME)

namespace {

// The widest first.
const std::vector<std::string> kArchs = {IPO_EXT_CPU_ARCHS(IPO_EXT_NAME)};

#undef IPO_EXT_DEFINE_NAME
#undef IPO_EXT_NAME

size_t place_of(const std::string& arch) {
  for (size_t i = 0; i < kArchs.size(); ++i) {
    if (kArchs[i] == arch) return i;
  }
  std::string names;
  for (const std::string& name : kArchs) names += (names.empty() ? "" : ", ") + name;
  throw std::invalid_argument("IPO_EXT_CPU_CAPABILITY: expected one of " + names + ", got '" +
                              arch + "'");
}

}  // namespace

bool allows(const char* arch) {
  const char* widest = std::getenv("IPO_EXT_CPU_CAPABILITY");
  return widest == nullptr || place_of(arch) >= place_of(widest);
}

std::string chosen_arch() {
  allows(kArchs.back().c_str());  // throws, where there is nothing to choose from too
  return IPO_EXT_CHOOSE(kArchName);
}

}  // namespace ipo_ext::cpu
