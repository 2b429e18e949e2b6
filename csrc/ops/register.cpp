// Registers the operators with torch: the schemas once, a kernel for each backend that this build
// has.
#include <torch/csrc/stable/library.h>

#include "ops/ipo_loss.h"
#include "ops/logits.h"

// Tests build this file once more, with the CUDA kernels emulated on the CPU under a namespace of
// their own.
#ifndef IPO_EXT_NAMESPACE
#define IPO_EXT_NAMESPACE ipo_ext
#endif
#ifndef IPO_EXT_CUDA_DISPATCH_KEY
#define IPO_EXT_CUDA_DISPATCH_KEY CUDA
#define IPO_EXT_WITH_CPU
#endif

STABLE_TORCH_LIBRARY(IPO_EXT_NAMESPACE, m) {
  m.def(ipo_ext::kIpoLossSchema);
  m.def(ipo_ext::kMetricMeansSchema);
  m.def(ipo_ext::kIpoLossFromLogitsSchema);
  m.def(ipo_ext::kIpoLossFromLogitsInplaceSchema);
  m.def(ipo_ext::kFindFaultsSchema);
  m.def(ipo_ext::kIpoLossRowsSchema);
  m.def(ipo_ext::kIpoLossOfRowsSchema);
  m.def(ipo_ext::kTokenLogprobsSchema);
  m.def(ipo_ext::kTokenLogprobsBackwardSchema);
  m.def(ipo_ext::kTokenLogprobsRowsSchema);
  m.def(ipo_ext::kTokenLogprobsRowsBackwardSchema);
  m.def(ipo_ext::kScaleSchema);
  m.def(ipo_ext::kScaleIntoSchema);
}

#define IPO_EXT_IMPL(op, Backend) m.impl(#op, TORCH_BOX(&ipo_ext::op<Backend>));

#define IPO_EXT_REGISTER(key, Backend)                   \
  STABLE_TORCH_LIBRARY_IMPL(IPO_EXT_NAMESPACE, key, m) { \
    IPO_EXT_IMPL(ipo_loss, Backend)                      \
    IPO_EXT_IMPL(metric_means, Backend)                  \
    IPO_EXT_IMPL(ipo_loss_from_logits, Backend)          \
    IPO_EXT_IMPL(ipo_loss_from_logits_, Backend)         \
    IPO_EXT_IMPL(find_faults, Backend)                   \
    IPO_EXT_IMPL(ipo_loss_rows, Backend)                 \
    IPO_EXT_IMPL(ipo_loss_of_rows, Backend)              \
    IPO_EXT_IMPL(token_logprobs, Backend)                \
    IPO_EXT_IMPL(token_logprobs_backward, Backend)       \
    IPO_EXT_IMPL(token_logprobs_rows, Backend)           \
    IPO_EXT_IMPL(token_logprobs_rows_backward, Backend)  \
    IPO_EXT_IMPL(scale_, Backend)                        \
    IPO_EXT_IMPL(scale_into, Backend)                    \
  }

#ifdef IPO_EXT_WITH_CPU
IPO_EXT_REGISTER(CPU, ipo_ext::CpuBackend)
#endif
#ifdef IPO_EXT_WITH_CUDA
IPO_EXT_REGISTER(IPO_EXT_CUDA_DISPATCH_KEY, ipo_ext::CudaBackend)
#endif
