// Registers the operators with torch: a row each, for each backend that this build has.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/box.h"
#include "ops/histogram.h"
#include "ops/ipo_loss.h"
#include "ops/logits.h"
#include "ops/scale.h"
#include "ops/schemas.h"
#include "ops/score_centering.h"
#include "ops/shards.h"

// Tests build this file once more, with the CUDA kernels emulated on the CPU under a namespace of
// their own.
#ifndef IPO_EXT_NAMESPACE
#define IPO_EXT_NAMESPACE ipo_ext
#endif
#ifndef IPO_EXT_CUDA_DISPATCH_KEY
#define IPO_EXT_CUDA_DISPATCH_KEY CUDA
#define IPO_EXT_WITH_CPU
#endif

namespace ipo_ext {
namespace {

struct Operator {
  std::string name;
  const char* schema;
  BoxedFunction function;
};

#define IPO_EXT_OPERATOR(name) {#name, schemas::name, box<&name<Backend>>}

template <typename Backend>
const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = {
      IPO_EXT_OPERATOR(ipo_loss),
      IPO_EXT_OPERATOR(component_loss),
      IPO_EXT_OPERATOR(score_centering),
      IPO_EXT_OPERATOR(log_ratio_histogram),
      IPO_EXT_OPERATOR(sequence_statistics),
      IPO_EXT_OPERATOR(fold_segments),
      IPO_EXT_OPERATOR(metric_means),
      IPO_EXT_OPERATOR(ipo_loss_from_logits),
      IPO_EXT_OPERATOR(ipo_loss_from_logits_),
      IPO_EXT_OPERATOR(token_logprobs),
      IPO_EXT_OPERATOR(token_logprobs_backward),
      IPO_EXT_OPERATOR(find_faults),
      IPO_EXT_OPERATOR(chunk_logprobs_and_gradient),
      IPO_EXT_OPERATOR(loss_and_metrics),
      IPO_EXT_OPERATOR(chunk_logprobs),
      IPO_EXT_OPERATOR(chunk_logprobs_backward),
      IPO_EXT_OPERATOR(chunk_packets),
      IPO_EXT_OPERATOR(gather_packets),
      IPO_EXT_OPERATOR(chunk_shard_backward),
      IPO_EXT_OPERATOR(scale_),
      IPO_EXT_OPERATOR(scale_rows_),
      IPO_EXT_OPERATOR(scale_into),
  };
  return all;
}

#undef IPO_EXT_OPERATOR

#ifdef IPO_EXT_WITH_CPU
using AnyBackend = CpuBackend;
#else
using AnyBackend = CudaBackend;
#endif

}  // namespace
}  // namespace ipo_ext

STABLE_TORCH_LIBRARY(IPO_EXT_NAMESPACE, library) {
  for (const auto& row : ipo_ext::operators<ipo_ext::AnyBackend>()) {
    library.def((row.name + row.schema).c_str());
  }
}

#ifdef IPO_EXT_WITH_CPU
STABLE_TORCH_LIBRARY_IMPL(IPO_EXT_NAMESPACE, CPU, library) {
  for (const auto& row : ipo_ext::operators<ipo_ext::CpuBackend>()) {
    library.impl(row.name.c_str(), row.function);
  }
}
#endif
#ifdef IPO_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(IPO_EXT_NAMESPACE, IPO_EXT_CUDA_DISPATCH_KEY, library) {
  for (const auto& row : ipo_ext::operators<ipo_ext::CudaBackend>()) {
    library.impl(row.name.c_str(), row.function);
  }
}
#endif
