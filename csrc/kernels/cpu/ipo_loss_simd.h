// Declares what ipo_loss_simd.cpp offers, for each instruction set it is compiled for.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/ipo_loss.h"

namespace ipo_ext::cpu {

// The name, the rules and the compute dtype of each version.
#define IPO_EXT_SPAN_SUMS(X)                          \
  X(span_sums_f32, math::Rules::kDefault, float)      \
  X(span_sums_f64, math::Rules::kDefault, double)     \
  X(span_sums_any_rule_f32, math::Rules::kAny, float) \
  X(span_sums_any_rule_f64, math::Rules::kAny, double)

// The name and the compute dtype of what sums sequences.
#define IPO_EXT_SEQUENCE_SUMS(X) \
  X(sequence_sums_f32, float)    \
  X(sequence_sums_f64, double)

// The name and the compute dtype of what adds the components.
#define IPO_EXT_ADD_COMPONENTS(X) \
  X(add_components_f32, float)    \
  X(add_components_f64, double)

// Each writes the gradients of tokens [begin, end), returns their sums and adds to `bounded`.
#define IPO_EXT_DECLARE_SPAN_SUMS(name, kRules, E)                                   \
  math::TileSums<E> name(const IpoLossArgs& args, const math::LossParams<E>& params, \
                         int64_t begin, int64_t end, math::BoundCounts<E>& bounded);
// Each returns what the rules on sequences look at of tokens [begin, end).
#define IPO_EXT_DECLARE_SEQUENCE_SUMS(name, E) \
  math::SequenceSums<E> name(const IpoLossArgs& args, int64_t begin, int64_t end);
// Each adds the components' gradients of tokens [begin, end) to the loss's and returns their sums.
#define IPO_EXT_DECLARE_ADD_COMPONENTS(name, E) \
  math::ComponentTotals name(const IpoLossArgs& args, int64_t begin, int64_t end);
#define IPO_EXT_DECLARE_ARCH(arch)                       \
  namespace arch {                                       \
  IPO_EXT_SPAN_SUMS(IPO_EXT_DECLARE_SPAN_SUMS)           \
  IPO_EXT_SEQUENCE_SUMS(IPO_EXT_DECLARE_SEQUENCE_SUMS)   \
  IPO_EXT_ADD_COMPONENTS(IPO_EXT_DECLARE_ADD_COMPONENTS) \
  }
IPO_EXT_CPU_ARCHS(IPO_EXT_DECLARE_ARCH)
#undef IPO_EXT_DECLARE_ARCH
#undef IPO_EXT_DECLARE_ADD_COMPONENTS
#undef IPO_EXT_DECLARE_SEQUENCE_SUMS
#undef IPO_EXT_DECLARE_SPAN_SUMS

}  // namespace ipo_ext::cpu
